"""A catalog and profiles over a fake engine."""

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry

from adapters import Store, save
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
from service.pool import Pool
from service.profiles import Profiles
from service.registry import Registry
from service.residency import Residency
from service.resolve import Names
from service.settings import Settings
from service.threads import Threads
from tests.adapters import samples
from tests.service.conftest import make_functions
from tests.service.policies import make_policy


@dataclass
class Engine:
    """Loads anything; an adapter moves a probe by `effect`, two probes of the base differ by `noise`."""

    effect: float = 1.0
    noise: float = 0.0
    base: float = 0.0
    probes: int = 0
    gate: asyncio.Event | None = None

    def hold(self) -> asyncio.Event:
        """Nothing is loaded until the event is set."""
        self.gate = asyncio.Event()
        return self.gate

    async def load(self, path: Path, name: str) -> Any:
        if self.gate is not None:
            await self.gate.wait()
        return SimpleNamespace(lora_name=name, lora_int_id=1, lora_path=str(path))

    async def unload(self, request: object) -> None:
        pass

    async def probe(self, prompt: Sequence[int], lora: object) -> list[dict[int, float]]:
        self.probes += 1
        return [{0: self.effect if lora is not None else self.base + self.noise * self.probes}]


@dataclass
class Shop:
    """A catalog and profiles with all below them."""

    catalog: Catalog
    profiles: Profiles
    engine: Engine
    root: Path
    sources: Store
    materializer: Materializer
    threads: Threads


@asynccontextmanager
async def open_shop(folder: Path, **settings: Any) -> AsyncIterator[Shop]:
    """A shop with its data in `folder`; in its root are `wide`, `narrow`, `third`, `fourth`, and `large` of rank 9."""
    root = folder / "root"
    options: dict[str, Any] = {"data": folder, "base_name": samples.BASE, "adapter_roots": (str(root),)}
    given = Settings(**options, max_lora_rank=8, **settings)
    registry, engine = Registry(f"sqlite:///{folder / 'registry.sqlite'}", timeout_s=5), Engine()
    metrics, writing = Metrics(CollectorRegistry()), asyncio.Lock()
    names = Names(samples.BASE, registry, max_weight=16.0, max_norm=math.inf)
    materializer = Materializer(Store(folder / "adapters", budget_bytes=2**40), 8, registry.describe)
    threads = Threads.start(waiting=10, wait_timeout_s=given.wait_timeout_s)
    builds = BuildFiles(Store(folder / "builds", budget_bytes=2**40), threads)
    files = AdapterFiles(materializer, builds, threads, registry.is_needed, timeout_s=given.wait_timeout_s)
    residency = Residency(engine, builds, metrics, capacity=4, max_waiting=128, wait_timeout_s=given.wait_timeout_s)
    pool = Pool(
        residency,
        materializer,
        Limits(mixing=True, max_rank=8),
        make_functions(materializer, threads, given.wait_timeout_s),
        hold=files.hold,
        clients=ClientPlaces(metrics, limit=9, max_waiting=9),
        checks=ClientTurns("checks", given.wait_timeout_s),
    )
    catalog = Catalog(given, registry, names, pool, Effects(pool, engine), BaseLayers(samples.SHAPES), files, writing)
    profiles = Profiles(given, registry, names, pool, metrics, files, make_policy(registry), writing)
    if not root.exists():
        for seed, name in enumerate(("wide", "narrow", "third", "fourth")):
            save(samples.adapter(seed, 3), root / name)
        save(samples.adapter(9, 9), root / "large")
    yield Shop(catalog, profiles, engine, root, materializer.sources, materializer, threads)
    threads.close()
    registry.close()
