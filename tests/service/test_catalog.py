"""The catalog and profiles over a fake engine: what is registered, what is refused, what is left behind."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from adapters import AdapterError, Store, save
from adapters.files.shipped import CHECKOUT
from service.catalog import Catalog
from service.errors import ApiError
from service.materializer import Materializer
from service.metrics import Metrics
from service.placement import Limits
from service.pool import Pool
from service.profiles import Profiles
from service.registry import Registry
from service.residency import Residency
from service.resolve import Names
from service.settings import Settings
from tests.adapters import samples

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


@dataclass
class Engine:
    """Loads anything; an adapter moves a probe by `effect`, two probes of the base differ by `noise`."""

    effect: float = 1.0
    noise: float = 0.0
    probes: int = 0

    async def load(self, path: Path, name: str) -> Any:
        return SimpleNamespace(lora_name=name, lora_int_id=1, lora_path=str(path))

    async def unload(self, request: object) -> None:
        pass

    async def probe(self, prompt: Sequence[int], lora: object) -> list[dict[int, float]]:
        self.probes += 1
        return [{0: self.effect if lora is not None else self.noise * self.probes}]


@dataclass
class Shop:
    """A catalog and profiles with all below them."""

    catalog: Catalog
    profiles: Profiles
    engine: Engine
    root: Path


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    root = tmp_path / "root"
    settings = Settings(data=tmp_path, base_name=samples.BASE, adapter_roots=(str(root),), max_names=3, max_lora_rank=8)
    registry, engine = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}"), Engine()
    metrics, writing = Metrics(CollectorRegistry()), asyncio.Lock()
    names = Names(samples.BASE, registry, max_weight=16.0)
    materializer = Materializer(Store(tmp_path / "adapters", budget_bytes=2**40), 8)
    residency = Residency(engine, Store(tmp_path / "builds", budget_bytes=2**40), metrics, capacity=4)
    pool = Pool(residency, materializer, Limits(mixing=True, max_rank=8))
    catalog = Catalog(settings, registry, names, materializer, pool, engine, samples.SHAPES, writing)
    profiles = Profiles(settings, registry, names, pool, metrics, writing)
    for seed, name in enumerate(("wide", "narrow", "third", "fourth")):
        save(samples.adapter(seed, 3), root / name)
    save(samples.adapter(9, 9), root / "large")
    yield Shop(catalog, profiles, engine, root)
    registry.close()


async def test_an_adapter_is_registered_once_under_its_name(shop: Shop) -> None:
    record, new = await shop.catalog.add("wide", shop.root / "wide")
    assert (new, record.rank, record.info["effect"]) == (True, 3, 1.0)
    assert await shop.catalog.add("wide", shop.root / "wide") == (record, False)
    with pytest.raises(ApiError, match="'wide' is already an adapter"):
        await shop.catalog.add("wide", shop.root / "narrow")


async def test_an_adapter_without_effect_is_refused_and_leaves_no_files(shop: Shop) -> None:
    shop.engine.effect, shop.engine.noise = 0.1, 0.05
    with pytest.raises(AdapterError, match="the adapter has no effect: probe log-probabilities moved by"):
        await shop.catalog.add("wide", shop.root / "wide")
    assert not shop.catalog.registry.adapters
    assert not shop.catalog.materializer.sources.entries()


async def test_what_this_server_cannot_serve_is_refused(shop: Shop) -> None:
    with pytest.raises(ApiError, match="rank 9 is over FUSION_MAX_LORA_RANK=8"):
        await shop.catalog.add("large", shop.root / "large")
    for name in ("wide", "narrow", "third"):
        await shop.catalog.add(name, shop.root / name)
    with pytest.raises(ApiError, match="already 3 adapters, the limit"):
        await shop.catalog.add("fourth", shop.root / "fourth")


async def test_a_pinned_adapter_stays_until_its_profiles_go(shop: Shop) -> None:
    await shop.catalog.add("wide", shop.root / "wide")
    await shop.profiles.put("even", "0.5*wide")
    with pytest.raises(ApiError, match="'wide' is used by even"):
        await shop.catalog.remove("wide")
    await shop.profiles.remove("even")
    await shop.catalog.remove("wide")
    assert not shop.catalog.materializer.sources.entries()
    with pytest.raises(ApiError, match="There is no model 'wide'"):
        await shop.catalog.remove("wide")


async def test_two_names_share_one_adapter_s_files(shop: Shop) -> None:
    for name in ("one", "other"):
        await shop.catalog.add(name, shop.root / "wide")
    assert len(shop.catalog.materializer.sources.entries()) == 1
    await shop.catalog.remove("one")
    assert shop.catalog.names.look_up("other") is not None
    assert len(shop.catalog.materializer.sources.entries()) == 1


async def test_a_profile_gets_versions_and_rolls_back(shop: Shop) -> None:
    await shop.catalog.add("wide", shop.root / "wide")
    first, new = await shop.profiles.put("even", "1*wide", defaults={"max_tokens": 2}, description="plain")
    second, newer = await shop.profiles.put("even", "-1*wide")
    assert (first.version, new, second.version, newer) == (1, True, 2, False)
    assert await shop.profiles.rollback("even", 1) == first
    with pytest.raises(ApiError, match="has no version '3'; it has 1, 2"):
        await shop.profiles.rollback("even", 3)
    for name, words in (("wide", "is already an adapter"), (samples.BASE, "is already the base model")):
        with pytest.raises(ApiError, match=words):
            await shop.profiles.put(name, "1*wide")
    for fusion in ("even", samples.BASE):
        with pytest.raises(ApiError, match="must be a recipe over adapters"):
            await shop.profiles.put("other", fusion)


async def test_paths_are_allowed_inside_the_roots_and_for_what_ships(shop: Shop, tmp_path: Path) -> None:
    assert shop.catalog.resolve_path(str(shop.root / "wide")) == shop.root / "wide"
    assert shop.catalog.resolve_path("shipped:task") == CHECKOUT / "task"
    (shop.root / "link").symlink_to(tmp_path / "adapters")
    for path in (str(tmp_path), str(shop.root / "link"), "/etc", "", "no/such", "wide\0"):
        with pytest.raises(ApiError) as caught:
            shop.catalog.resolve_path(path)
        assert caught.value.status == 400
    with pytest.raises(AdapterError, match="bundled adapters: shipped:safety, shipped:task"):
        shop.catalog.resolve_path("shipped:../task")
