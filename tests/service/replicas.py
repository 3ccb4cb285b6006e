"""Replicas without engines: catalogs over fake engines, on one PostgreSQL and one shared folder; and a cut line."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy
from anyio.to_thread import run_sync
from prometheus_client import CollectorRegistry

from adapters import save
from service.adapter_files import AdapterFiles
from service.build_files import BuildFiles
from service.catalog import Catalog
from service.client_turns import ClientTurns
from service.clients import ClientPlaces
from service.effect import Effects
from service.layers import BaseLayers
from service.materializer import Materializer
from service.metrics import Metrics
from service.placement import Limits
from service.pool import Lease, Pool
from service.profiles import Profiles
from service.registry import Registry
from service.replicas import claim_store, follow, open_stores
from service.residency import Residency
from service.resolve import Names
from service.settings import Settings
from service.threads import Threads
from tests.adapters import samples
from tests.service.conftest import make_functions
from tests.service.databases import Postgres
from tests.service.policies import make_policy

MAX_RANK = 8
SWITCH_S = 2.0
"""How soon a change of one replica is served by the others."""


@dataclass
class Engine:
    """Loads anything; an adapter moves a probe."""

    loaded: list[str] = field(default_factory=list)

    async def load(self, path: Path, name: str) -> Any:
        self.loaded.append(name)
        return SimpleNamespace(lora_name=name, lora_int_id=1, lora_path=str(path))

    async def unload(self, request: Any) -> None:
        self.loaded.remove(request.lora_name)

    async def probe(self, prompt: Sequence[int], lora: object) -> list[dict[int, float]]:
        return [{0: float(lora is not None)}]


@dataclass
class Replica:
    """One of them, with all below it."""

    data: Path
    registry: Registry
    names: Names
    pool: Pool
    catalog: Catalog
    profiles: Profiles
    materializer: Materializer
    builds: BuildFiles
    metrics: Metrics
    engine: Engine
    root: Path

    async def add(self, name: str) -> None:
        """Register the sample adapter of that name."""
        await self.catalog.add(name, self.root / name)

    async def lease(self, model: str) -> Lease:
        """What serves `model` now, made if need be, and given back."""
        fusion = self.names.look_up(model)
        assert fusion is not None
        async with self.pool.lease(fusion) as lease:
            return lease

    def serves(self, name: str) -> int:
        """The version of a profile that a request gets now; 0 when there is none."""
        profile = self.registry.profiles.get(name)
        return 0 if profile is None else profile.version


def write_samples(root: Path) -> None:
    """Folders of four adapters."""
    for seed, name in enumerate(("a", "b", "c", "d")):
        save(samples.adapter(seed, 3), root / name)


@asynccontextmanager
async def run_replica(
    url: str, folder: Path, name: str, *, timeout_s: float = 5, **changes: Any
) -> AsyncIterator[Replica]:
    """A replica with its data in `folder/name`, following its registry; `changes` are settings."""
    root, data = folder / "root", folder / name
    settings = Settings(
        data=data,
        database=url,
        base_name=samples.BASE,
        adapter_roots=(str(root),),
        max_lora_rank=MAX_RANK,
        **{"store": str(folder / "shared"), **changes},
    )
    data.mkdir(exist_ok=True)
    registry = await run_sync(partial(Registry, url, timeout_s=timeout_s, shared=True))
    threads, engine = Threads.start(waiting=50, wait_timeout_s=30), Engine()
    with closing(registry), closing(threads):
        metrics, writing = Metrics(CollectorRegistry()), asyncio.Lock()
        await run_sync(claim_store, settings, registry.identity)
        names = Names(samples.BASE, registry, max_weight=16.0, max_norm=math.inf)
        sources, builds = open_stores(settings, registry, threads)
        materializer = Materializer(sources, MAX_RANK)
        files = AdapterFiles(materializer, builds, threads, registry.is_needed, timeout_s=30)
        residency = Residency(engine, builds, metrics, capacity=4, max_waiting=128, wait_timeout_s=30)
        pool = Pool(
            residency,
            materializer,
            Limits(mixing=True, max_rank=MAX_RANK),
            make_functions(materializer, threads, 30),
            hold=files.hold,
            clients=ClientPlaces(metrics, limit=9, max_waiting=9),
            checks=ClientTurns("checks", 30),
        )
        catalog = Catalog(
            settings, registry, names, pool, Effects(pool, engine), BaseLayers(samples.SHAPES), files, writing
        )
        profiles = Profiles(settings, registry, names, pool, metrics, files, make_policy(registry), writing)
        service: Any = SimpleNamespace(settings=settings, registry=registry, catalog=catalog, pool=pool, files=files)
        service.metrics, service.materializer, service.threads = metrics, materializer, threads
        watch = asyncio.create_task(registry.watch())
        try:
            with follow(service):
                yield Replica(
                    data, registry, names, pool, catalog, profiles, materializer, builds, metrics, engine, root
                )
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch


class Line:
    """A PostgreSQL's socket, passed on until the line is cut."""

    def __init__(self, url: str, folder: Path) -> None:
        parsed = sqlalchemy.make_url(url)
        self._target = Path(str(parsed.query["host"])) / f".s.PGSQL.{parsed.query.get('port', 5432)}"
        self._place = folder / ".s.PGSQL.5432"
        self.url = parsed.set(query={"host": str(folder)}).render_as_string(hide_password=False)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def mend(self) -> None:
        """Pass on what comes from now on."""
        self._server = await asyncio.start_unix_server(self._pass_on, self._place)

    async def cut(self) -> None:
        """Close all connections, and take no new ones."""
        assert self._server is not None
        self._server.close()
        self._place.unlink(missing_ok=True)
        for writer in self._writers:
            writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(self._target)
        self._writers |= {writer, far_writer}
        await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))
        self._writers -= {writer, far_writer}


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while part := await reader.read(65536):
            writer.write(part)
            await writer.drain()
    writer.close()


async def until(condition: Callable[[], bool], limit_s: float = SWITCH_S) -> float:
    """Seconds until `condition` holds, at most `limit_s`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s
        await asyncio.sleep(0.005)
    return time.monotonic() - began


@pytest.fixture(name="pair")
async def filled_pair(postgres: Postgres, tmp_path: Path) -> AsyncIterator[tuple[Replica, Replica]]:
    """Two replicas that both have the adapters `a` and `b`."""
    write_samples(tmp_path / "root")
    with postgres.fresh() as url:
        async with run_replica(url, tmp_path, "one") as one, run_replica(url, tmp_path, "two") as two:
            for name in ("a", "b"):
                await one.add(name)
            await until(lambda: {"a", "b"} <= two.registry.adapters.keys())
            yield one, two
