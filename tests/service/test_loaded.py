"""What routers are told is loaded: over a pool without an engine, in the series' own text."""

import asyncio
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from adapters import parse
from service.engine.names import LORA_INFO
from service.loaded import LoadedNames
from service.loaded_series import LOADED, LOADED_CPU, LOADED_GPU, MAX_GPU, NAMES
from service.metrics import Metrics
from service.records import AdapterRecord, ProfileVersion, now
from service.registry import Registry
from service.resolve import Names
from tests.adapters import samples
from tests.service.conftest import RANKS, World, adapter_info, fill

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]
PROFILES = {"both": "0.5*a + 0.5*b", "cut": "svd(1*a + 1*b, rank=2)", "wide": "1*d", "third": "1*c"}


@pytest.fixture
def names(tmp_path: Path) -> Iterator[Names]:
    """The world's adapters, profiles of them, each in two versions, and a gate."""
    registry = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}", timeout_s=5)
    names = Names("base", registry, max_weight=16, max_norm=math.inf)
    for seed, (name, rank) in enumerate(RANKS.items()):
        digest = samples.adapter(seed, rank).digest
        info = adapter_info(rank=rank, fusion_digest=f"{seed}" * 64)
        fill(registry, AdapterRecord(name, digest, info, now()))
    fill(registry, AdapterRecord("gate", "9" * 64, adapter_info(fusion_digest="9" * 64, gate="{}"), now()))
    for name, text in PROFILES.items():
        fusion = names.resolve_recipe(parse(text))
        for version in (1, 2):
            fill(registry, ProfileVersion(name, version, text, dict(fusion.parents), fusion.digest, {}))
    yield names
    registry.close()


class Router:
    """Reads a replica's series as routers do."""

    def __init__(self, names: Names, world: World, *forms: str) -> None:
        self._series = CollectorRegistry()
        self.metrics = Metrics(self._series)
        self.metrics.loaded.source = LoadedNames(names, world.pool, forms, 1).survey

    def read(self) -> dict[str, set[str]]:
        """`loaded`, `waiting` and those in `slots`, by name; `room` is empty when the replica has none."""
        text = generate_latest(self._series).decode()
        assert all(f"# TYPE {name} " in text for name in NAMES)
        row = next(row for row in text.splitlines() if row.startswith(f"{LORA_INFO}{{"))
        labels = dict(re.findall(r'(\w+)="([^"]*)"', row))
        loaded, waiting = (labels[f"{kind}_lora_adapters"].split(",") for kind in ("running", "waiting"))
        found = {"loaded": {*loaded} - {""}, "waiting": {*waiting} - {""}}
        rows = [dict(re.findall(r'(\w+)="([^"]*)"', row)) for row in text.splitlines() if row.startswith(f"{LOADED}{{")]
        assert {row["adapter_name"] for row in rows} == found["loaded"]
        found["slots"] = {row["adapter_name"] for row in rows if row["level"] == "gpu"}
        assert self._value(LOADED_GPU) == len(found["slots"])
        assert self._value(LOADED_CPU) == len(found["loaded"])
        has_room = len(found["loaded"]) + len(found["waiting"]) < int(labels["max_lora"])
        return found | {"room": {"yes"} if has_room else set()}

    def _value(self, name: str) -> float | None:
        return self._series.get_sample_value(name)

    def has_free_slot(self) -> bool:
        count, limit = self._value(LOADED_GPU), self._value(MAX_GPU)
        assert count is not None
        assert limit is not None
        return count < limit


async def test_a_mix_counts_for_its_profiles_and_its_adapters(names: Names, world: Callable[..., World]) -> None:
    w = world(capacity=2)
    router = Router(names, w)
    assert router.read() == {"loaded": set(), "waiting": set(), "slots": set(), "room": {"yes"}}
    await w.warm("0.9*a + 0.1*b")  # a recipe that nobody has named
    assert router.read()["loaded"] == {"a", "b", "both"}
    await w.warm("svd(1*a + 1*b, rank=2)")
    assert router.read()["loaded"] == {"a", "b", "both", "cut"}
    assert router.read()["slots"] == {"cut"}, "of one slot, what was used last"


async def test_there_is_room_as_long_as_something_idle_would_make_way(
    names: Names, world: Callable[..., World]
) -> None:
    w = world(capacity=2)
    router = Router(names, w)
    await w.warm("0.5*a + 0.5*b", "1*c")
    assert router.read()["room"] == {"yes"}
    async with w.pool.lease(w.fusion("1*a")):
        assert router.read()["room"] == {"yes"}
        assert not router.has_free_slot()
        async with w.pool.lease(w.fusion("1*c")):
            assert router.read()["room"] == set()
    assert router.has_free_slot()


async def test_what_requests_wait_for_is_waiting(names: Names, world: Callable[..., World]) -> None:
    w = world(capacity=2)
    router = Router(names, w)
    w.engine.wait = asyncio.Event()
    waiting = [asyncio.create_task(w.pool.acquire(w.fusion(text))) for text in ("1*a + 1*b", PROFILES["cut"])]
    while router.read()["room"]:  # until both are being loaded, and hold the places
        await asyncio.sleep(0.01)
    expected: dict[str, set[str]] = {
        "loaded": set(),
        "waiting": {"a", "b", "both", "cut"},
        "slots": set(),
        "room": set(),
    }
    assert router.read() == expected
    w.engine.wait.set()
    await asyncio.gather(*waiting)
    assert router.read()["waiting"] == set()


async def test_other_forms_are_listed_where_the_operator_wants_them(names: Names, world: Callable[..., World]) -> None:
    w = world()
    await w.warm("1*c")
    assert Router(names, w).read()["loaded"] == {"c", "third"}
    assert Router(names, w, "versions", "aliases").read()["loaded"] == {
        *("c", "base:c"),
        *("third", "base:third", "third@1", "third@2"),
    }
    assert Router(names, w, "publishers/team").read()["loaded"] == {
        *("c", "publishers/team/models/c", "third", "publishers/team/models/third")
    }


async def test_without_an_engine_nothing_is_said(names: Names, world: Callable[..., World]) -> None:
    series = CollectorRegistry(auto_describe=True)
    Metrics(series)
    assert "vllm:" not in generate_latest(series).decode()
    with pytest.raises(ValueError, match="Duplicated"):
        Metrics(series)


async def test_a_name_that_cannot_be_served_is_not_listed(names: Names, world: Callable[..., World]) -> None:
    w = world()
    router = Router(names, w)
    await w.warm("1*c")
    await names.registry.remove_adapter("c")  # its profile keeps the content
    assert router.read()["loaded"] == {"third"}
    await names.registry.remove_profile("third")
    assert router.read()["loaded"] == set()
