"""For tests of the service's parts without an engine: asyncio with a time limit, and a pool over a faulty engine."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest
from prometheus_client import CollectorRegistry

from adapters import LoraAdapter, Store, fusion_digest, parse
from service.materializer import Materializer
from service.metrics import Metrics
from service.placement import Limits
from service.pool import Pool
from service.residency import Residency
from service.resolve import Fusion
from tests.adapters import samples

RANKS = {"a": 4, "b": 2, "c": 3, "d": 20}
MAX_RANK = 16
TIME_LIMIT_S = 60


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


@pytest.fixture
def world(tmp_path: Path) -> Callable[..., World]:
    def make(*, capacity: int = 3, mixing: bool = True, groups: Sequence[str] = ()) -> World:
        materializer = Materializer(Store(tmp_path / "sources", budget_bytes=2**40), MAX_RANK)
        adapters = {name: samples.adapter(seed, rank) for seed, (name, rank) in enumerate(RANKS.items())}
        for adapter in adapters.values():
            materializer.add(adapter)
        engine, store = FaultyEngine(), Store(tmp_path / "builds", budget_bytes=2**40)
        residency = Residency(engine, store, Metrics(CollectorRegistry()), capacity=capacity)
        pool = Pool(
            residency,
            materializer,
            Limits(mixing, MAX_RANK),
            lambda: [{adapters[n].digest: adapters[n].rank for n in group.split("+")} for group in groups],
        )
        return World(engine, residency, pool, adapters, materializer, store)

    return make
