"""One server over what older versions, disks and databases leave: adapters without a measure, damage, a stall.

The damage is in `test_damaged_server`, which mends it; the adapters of huge numbers are `test_poison`'s.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import torch
from sqlalchemy import create_engine, text

from adapters import LoraAdapter, LoraModule, Store, fusion_digest, load, make_adapter, parse, save
from adapters.files import adapter_path, write_checksums
from service.materializer import Materializer
from service.placement import build_key, stack_key
from service.records import AdapterRecord, ProfileVersion, now
from service.registry import Registry
from service.residency import ADAPTER, REPORT
from service.resolve import Fusion
from tests.conftest import BASE_NAME, Server, launch, stop, wait_ready
from tests.service.conftest import adapter_info, fill
from tests.service.databases import Postgres
from tests.service.test_damage import CONFIG, WEIGHTS, flip

CHAT = {"messages": [{"role": "user", "content": "Count to ten."}], "max_tokens": 4, "temperature": 0}
TIMEOUT_S = 2
MAX_RANK = 32
MAX_WEIGHT = 10_000
"""More than the default, and as much as lets adapters of an ordinary norm be registered."""


@dataclass(frozen=True)
class Aged:
    """The server under test."""

    url: str
    postgres: Postgres
    builds: Path

    def ask(self, model: str) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json={**CHAT, "model": model}, timeout=300)


def scale(adapter: LoraAdapter, number: float, dtype: torch.dtype = torch.float32) -> LoraAdapter:
    """`adapter` with both factors times `number`."""
    modules = {
        name: LoraModule((m.a.double() * number).to(dtype), (m.b.double() * number).to(dtype), m.scaling)
        for name, m in adapter.modules.items()
    }
    return make_adapter(modules, BASE_NAME)


def add_unmeasured(materializer: Materializer, registry: Registry) -> None:
    """Adapters that were never measured, so that neither registration nor the check of a mix can refuse them."""
    task = load(adapter_path("shipped:task"))
    adapters = {
        "task": task,
        "safety": load(adapter_path("shipped:safety")),
        "high": scale(task, 1e17),
        "loud": scale(task, 1e18),
        "huge": scale(task, 1e37),
    }
    for name, adapter in adapters.items():
        materializer.add(adapter)
        fill(registry, AdapterRecord(name, adapter.digest, adapter_info(adapter.rank, norm=1e-30), now()))


def add_loud_head(data: Path, materializer: Materializer, registry: Registry) -> None:
    """An adapter whose hidden states are the base's and whose logits overflow, with the build an old version made."""
    torch.manual_seed(0)
    factors = LoraModule(torch.randn(4, 576) * 1e20, torch.randn(49152, 4) * 1e20, 1.0)
    adapter = make_adapter({"lm_head": factors}, BASE_NAME)
    materializer.add(adapter)
    entry = record("loud-head", adapter)
    fill(registry, replace(entry, info={**entry.info, "built": "lm_head", "norm": 1e-30}))
    fusion = Fusion(parse("loud-head"), {"loud-head": adapter.digest}, str(entry.info["fusion_digest"]), "loud-head")

    def write(folder: Path) -> None:
        save(adapter, folder / ADAPTER)
        (folder / REPORT).write_text(json.dumps({"rank": adapter.rank, "error": 0.0}))
        write_checksums(folder)

    Store(data / "builds", budget_bytes=2**40).land(build_key(fusion, MAX_RANK), write)


def record(name: str, adapter: LoraAdapter) -> AdapterRecord:
    digest = fusion_digest(parse(name), base=BASE_NAME, parents={name: adapter.digest})
    return AdapterRecord(name, adapter.digest, adapter_info(rank=adapter.rank, fusion_digest=digest), now())


def damage(data: Path, database: str, materializer: Materializer, adapters: dict[str, LoraAdapter]) -> None:
    """What happens to the files and rows of a server on disks and in databases."""
    pair = [adapters[name].digest for name in ("stable", "pattern")]
    builds = Store(data / "builds", budget_bytes=2**40)
    stack = builds.land(stack_key(pair), lambda entry: materializer.write_stack(sorted(pair), entry))
    flip(stack / WEIGHTS)
    flip(data / "adapters" / adapters["wide"].digest / WEIGHTS)
    (data / "adapters" / adapters["narrow"].digest / CONFIG).write_text("{")
    engine = create_engine(database)
    info = json.dumps(adapter_info(effect=float("nan")))
    with engine.begin() as connection:
        row = {"d": "7" * 64, "i": info, "c": now()}
        connection.execute(text("INSERT INTO adapters VALUES ('not-a-number', :d, :i, :c, NULL)"), row)
        connection.execute(text("INSERT INTO profiles VALUES ('half', 1)"))
        connection.execute(text("INSERT INTO profile_versions VALUES ('half', 1, '{', NULL)"))
    engine.dispose()


def prepare(data: Path, database: str, adapters: dict[str, LoraAdapter]) -> None:
    """A data folder and a database as a server leaves them, and then what happens to them."""
    materializer = Materializer(Store(data / "adapters", budget_bytes=2**40), MAX_RANK)
    registry = Registry(database, timeout_s=5)
    add_unmeasured(materializer, registry)
    add_loud_head(data, materializer, registry)
    for adapter in adapters.values():
        materializer.add(adapter)
    lost = ProfileVersion("pins-nothing", 1, "1*lost", {"lost": "9" * 64}, "8" * 64, created=now())
    fill(registry, *(record(name, adapter) for name, adapter in adapters.items()), lost)
    registry.close()
    damage(data, database, materializer, adapters)


@pytest.fixture(scope="package")
def aged(server: Server, postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aged]:
    folder = tmp_path_factory.mktemp("aged")
    prepare(folder / "data", postgres.url, {name: load(path) for name, path in server.adapters.items()})
    process, url = launch(
        folder / "data",
        server.adapters["wide"].parent,
        folder / "log",
        FUSION_DATABASE=postgres.url,
        FUSION_DATABASE_TIMEOUT_S=str(TIMEOUT_S),
        FUSION_MAX_WEIGHT=str(MAX_WEIGHT),
        VLLM_CPU_KVCACHE_SPACE="1",
    )
    try:
        wait_ready(process, url, folder / "log")
        yield Aged(url, postgres, folder / "data/builds")
    finally:
        stop(process)
        engine = create_engine(postgres.url)
        with engine.begin() as connection:
            for table in ("scorecards", "profile_versions", "profiles", "adapters"):
                connection.execute(text(f"DELETE FROM {table}"))
        engine.dispose()
