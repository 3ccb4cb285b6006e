"""For tests of the service's parts without an engine: asyncio with a time limit, and a pool over a faulty engine."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from adapters import LoraAdapter, Store, fusion_digest, parse
from service.adapter_files import AdapterFiles
from service.build_files import BuildFiles
from service.client_turns import ClientTurns
from service.clients import ClientPlaces
from service.functions import Functions
from service.limits import open_limits
from service.materializer import Materializer
from service.metrics import Metrics
from service.placement import Home, Limits
from service.pool import Pool
from service.records import AdapterRecord, ProfileVersion
from service.registry import Registry
from service.residency import Residency
from service.resolve import Fusion, Names
from service.scorecards import Scorecards
from service.settings import Settings
from service.threads import Threads
from tests.adapters import samples
from tests.service.databases import Postgres, run_postgres
from tests.service.policies import make_policy
from tests.service.rings import make_keys

RANKS = {"a": 4, "b": 2, "c": 3, "d": 20}
MAX_RANK = 16
TIME_LIMIT_S = 60
IDLE_POOL = SimpleNamespace(groups=[], find_home=lambda _: Home("e" * 64, None), home_state=lambda _: ("evicted", None))
"""What is asked of the pool for lists."""


def fill(registry: Registry, *entries: AdapterRecord | ProfileVersion) -> Registry:
    """The registry with these entries."""

    async def add() -> None:
        for entry in entries:
            await (registry.add_adapter(entry) if isinstance(entry, AdapterRecord) else registry.add_version(entry))

    asyncio.run(add())
    return registry


def adapter_info(rank: int = 1, **changes: object) -> dict[str, object]:
    """What the registry keeps of an adapter of this rank."""
    info = {"rank": rank, "modules": 1, "bytes": 8, "dtype": "float32", "fusion_digest": "0" * 64, "effect": 1.0}
    return info | changes


def make_service(registry: Registry, names: Names, settings: Settings) -> Any:
    """What a service's own routes need of it, without an engine."""
    engine = SimpleNamespace(
        app=FastAPI(),
        api_keys=(),
        cors={},
        alive=True,
        config=SimpleNamespace(model_config=SimpleNamespace(max_model_len=2048)),
        args=SimpleNamespace(disable_fastapi_docs=True),
    )
    return SimpleNamespace(
        engine=engine,
        registry=registry,
        names=names,
        pool=IDLE_POOL,
        metrics=Metrics(CollectorRegistry()),
        settings=settings,
        scorecards=Scorecards(settings, registry, asyncio.Lock()),
        policy=make_policy(registry),
        materializer=SimpleNamespace(damage={}),
        fetches=SimpleNamespace(names=lambda _: set(), get=lambda *_: None),
        files=None,
        threads=None,
        keys=make_keys(registry, settings),
        limits=open_limits(settings, registry, Metrics(CollectorRegistry())),
    )


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def time_limit() -> AsyncIterator[None]:
    with anyio.fail_after(TIME_LIMIT_S):
        yield


@dataclass
class FaultyEngine:
    """Counts what is loaded; fails or waits as a test says."""

    loaded: dict[str, Path] = field(default_factory=dict)
    fault: Exception | None = None
    wait: asyncio.Event | None = None
    unload_fault: Exception | None = None

    async def load(self, path: Path, name: str) -> str:
        if self.wait is not None:
            await self.wait.wait()
        if self.fault is not None:
            raise self.fault
        assert (path / "adapter_model.safetensors").is_file()
        assert name not in self.loaded, "loaded twice"
        self.loaded[name] = path
        return name

    async def unload(self, request: object) -> None:
        await asyncio.sleep(0)
        if self.unload_fault is not None:
            raise self.unload_fault
        del self.loaded[str(request)]


@dataclass
class World:
    """A pool with all below it."""

    engine: FaultyEngine
    residency: Residency
    pool: Pool
    adapters: dict[str, LoraAdapter]
    materializer: Materializer
    store: Store
    files: AdapterFiles
    removed: set[str]
    """Digests of adapters that are registered no more."""
    series: CollectorRegistry

    def fusion(self, text: str) -> Fusion:
        recipe = parse(text)
        parents = {name: self.adapters[name].digest for name in recipe.adapters}
        digest = fusion_digest(recipe, base="base", parents=parents)
        ranks = {self.adapters[name].digest: self.adapters[name].rank for name in recipe.adapters}
        return Fusion(recipe, parents, digest, "(inline)", ranks=ranks)

    async def warm(self, *texts: str) -> None:
        """Have each fusion made, one after the other, and let go of it."""
        for text in texts:
            async with self.pool.lease(self.fusion(text)):
                pass

    def hurry(self, wait_timeout_s: float) -> None:
        """Have requests wait no longer than this from now on."""
        self.residency._attempts._timeout_s = wait_timeout_s  # noqa: SLF001 - a setting of the whole run elsewhere

    async def settle(self) -> None:
        """Until the engine has unloaded what it was told to."""
        while self.residency._freeing:  # noqa: SLF001 - it shows nowhere else
            await asyncio.sleep(0.001)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with run_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a new, empty database of either kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'registry.sqlite'}"
    else:
        with request.getfixturevalue("postgres").fresh() as fresh:
            yield fresh


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    from tests.service.buckets import run_s3  # most tests need none

    with run_s3() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3: str) -> Iterator[Any]:
    """boto3's client, with an empty bucket on the server `s3`."""
    from tests.service.buckets import make_bucket

    with make_bucket(s3) as client:
        yield client


def make_functions(materializer: Materializer, threads: Threads, wait_timeout_s: float) -> Functions:
    turns = ClientTurns("functions", wait_timeout_s)
    return Functions(materializer.open, sorted(samples.SHAPES), threads.functions.run, lambda *_: None, turns)


@pytest.fixture
def world(tmp_path: Path) -> Callable[..., World]:
    def make(
        *,
        capacity: int = 3,
        mixing: bool = True,
        groups: Sequence[str] = (),
        max_waiting: int = 100,
        wait_timeout_s: float = 30,
        client_places: int = 100,
    ) -> World:
        materializer = Materializer(Store(tmp_path / "sources", budget_bytes=2**40), MAX_RANK)
        adapters = {name: samples.adapter(seed, rank) for seed, (name, rank) in enumerate(RANKS.items())}
        for adapter in adapters.values():
            materializer.add(adapter)
        engine, store = FaultyEngine(), Store(tmp_path / "builds", budget_bytes=2**40)
        series, removed = CollectorRegistry(), set[str]()
        metrics = Metrics(series)
        threads = Threads.start(waiting=100, wait_timeout_s=wait_timeout_s)
        builds = BuildFiles(store, threads)
        files = AdapterFiles(materializer, builds, threads, lambda digest: digest not in removed, timeout_s=5)
        residency = Residency(
            engine, builds, metrics, capacity=capacity, max_waiting=max_waiting, wait_timeout_s=wait_timeout_s
        )
        pool = Pool(
            residency,
            materializer,
            Limits(mixing, MAX_RANK),
            make_functions(materializer, threads, wait_timeout_s),
            lambda: [{adapters[n].digest: adapters[n].rank for n in group.split("+")} for group in groups],
            hold=files.hold,
            clients=ClientPlaces(metrics, limit=client_places, max_waiting=max_waiting),
            checks=ClientTurns("checks", wait_timeout_s),
        )
        return World(engine, residency, pool, adapters, materializer, store, files, removed, series)

    return make
