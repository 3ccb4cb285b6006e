"""The pool by itself, over an engine that can be told to fail: what is kept, what goes, and what is said."""

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from adapters import AdapterError, LoraAdapter, Store, fusion_digest, load, parse, save
from service.errors import ApiError, api_error
from service.metrics import Metrics
from service.pool import ADAPTER, Pool
from service.resolve import Fusion
from tests.adapters import samples

RANKS = {"a": 4, "b": 2, "c": 3, "d": 20}


@dataclass
class FaultyEngine:
    """Counts what is loaded; raises when told to."""

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
    """A pool with its store, adapters and engine."""

    engine: FaultyEngine
    pool: Pool
    adapters: dict[str, LoraAdapter]
    store: Store
    metrics: Metrics

    def fusion(self, text: str) -> Fusion:
        recipe = parse(text)
        parents = {name: self.adapters[name].digest for name in recipe.adapters}
        return Fusion(recipe, parents, fusion_digest(recipe, base="base", parents=parents), "(inline)")


@pytest.fixture
def world(tmp_path: Path) -> Callable[..., World]:
    def make(*, capacity: int = 3, mixing: bool = True, groups: Sequence[str] = ()) -> World:
        sources = Store(tmp_path / "sources", budget_bytes=2**40)
        adapters = {}
        for seed, (name, rank) in enumerate(RANKS.items()):
            made = samples.adapter(seed, rank)
            adapters[name] = made
            sources.land(made.digest, lambda folder, made=made: save(made, folder / ADAPTER))  # type: ignore[misc]  # mypy and the default of a lambda
        engine, metrics = FaultyEngine(), Metrics(CollectorRegistry())
        store = Store(tmp_path / "builds", budget_bytes=2**40)

        def source(digest: str) -> Path:
            path = sources.get(digest)
            assert path is not None
            return path / ADAPTER

        pool = Pool(
            engine,
            store,
            source,
            metrics,
            capacity=capacity,
            max_rank=16,
            mixing=mixing,
            groups=lambda: [tuple(adapters[n].digest for n in group.split("+")) for group in groups],
        )
        return World(engine, pool, adapters, store, metrics)

    return make


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


def test_all_weights_of_a_pair_share_one_stack(world: Callable[..., World]) -> None:
    async def main() -> None:
        w = world()
        for i in range(20):
            async with w.pool.lease(w.fusion(f"0.{i}*a + -1.{i}*b")) as lease:
                assert lease.mode == "mixed" and lease.rank == 6
                weights = {width: weight for width, weight in lease.spans or ()}
                assert weights == {4: float(f"0.{i}"), 2: float(f"-1.{i}")}
        assert len(w.engine.loaded) == 1

    run(main())


def test_a_part_of_a_resident_stack_needs_no_stack_of_its_own(world: Callable[..., World]) -> None:
    async def main() -> None:
        w = world(groups=("a+b+c",))
        async with w.pool.lease(w.fusion("1*a + 2*b")) as lease:
            assert sorted(weight for _, weight in lease.spans or ()) == [0, 1, 2]
            assert (lease.rank, lease.resident.rank) == (6, 9)
        async with w.pool.lease(w.fusion("3*c")) as lease:
            assert lease.source == "warm"

    run(main())


def test_a_declared_group_serves_its_adapters_even_where_a_smaller_stack_is(world: Callable[..., World]) -> None:
    async def main() -> None:
        groups: list[str] = []
        w = world(groups=groups)
        async with w.pool.lease(w.fusion("1*a")):  # registered alone, before the group is complete
            pass
        groups.append("a+b+c")
        async with w.pool.lease(w.fusion("1*a")) as one, w.pool.lease(w.fusion("1*b + 1*c")) as other:
            assert one.resident is other.resident and one.resident.rank == 9

    run(main())


def test_what_runs_already_is_joined_and_idle_stacks_give_the_smallest(world: Callable[..., World]) -> None:
    async def main() -> None:
        w = world()
        for text in ("1*a", "1*a + 1*b"):
            async with w.pool.lease(w.fusion(text)):
                pass
        async with w.pool.lease(w.fusion("2*a")) as lease:
            assert lease.resident.rank == 4
        async with w.pool.lease(w.fusion("3*a + 1*b")) as pair, w.pool.lease(w.fusion("2*a")) as lease:
            assert lease.resident is pair.resident
        assert len(w.engine.loaded) == 2

    run(main())


@pytest.mark.parametrize(
    ("text", "mixing", "words"),
    [
        ("1*a + 1*d", True, "ranks add up to 24"),
        ("svd(1*a + 1*b, rank=2)", True, "'svd' is no plain sum"),
        ("1*a + 1*b", False, "mixing is off"),
    ],
)
def test_what_is_built_says_why(world: Callable[..., World], text: str, mixing: bool, words: str) -> None:
    async def main() -> None:
        w = world(mixing=mixing)
        fusion = w.fusion(text)
        assert words in str(w.pool.why_built(fusion))
        async with w.pool.lease(fusion) as lease:
            assert lease.mode == "built" and lease.rank <= 16
            assert load(lease.resident.path / ADAPTER).rank == lease.rank

    run(main())


def test_many_waiters_share_one_making_and_outlive_the_first(world: Callable[..., World]) -> None:
    async def main() -> None:
        w = world()
        w.engine.wait = asyncio.Event()
        fusion = w.fusion("1*a + 1*b")
        waiting = [asyncio.create_task(w.pool.acquire(fusion)) for _ in range(50)]
        await asyncio.sleep(0.2)
        assert w.pool.state(fusion)[0] in ("queued", "fusing", "loading")
        waiting[0].cancel()
        w.engine.wait.set()
        leases = await asyncio.gather(*waiting[1:])
        assert {lease.source for lease in leases} == {"built"}
        assert leases[0].resident.leases == 49 and len(w.engine.loaded) == 1
        assert w.pool.state(fusion) == ("warm", None)

    run(main())


def test_eviction_waits_for_leases_and_takes_the_longest_unused(world: Callable[..., World]) -> None:
    async def main() -> None:
        w = world(capacity=2)
        held = await w.pool.acquire(w.fusion("1*a"))
        async with w.pool.lease(w.fusion("1*b")):
            pass
        async with w.pool.lease(w.fusion("1*c")):  # takes b's place, a is in use
            assert {r.rank for r in w.pool.residents.values()} == {4, 3}
            waiting = asyncio.create_task(w.pool.acquire(w.fusion("1*b")))
            await asyncio.sleep(0.1)
            assert not waiting.done(), "both places are in use"
        back = await waiting
        assert back.source == "loaded", "its files were kept"
        assert {r.rank for r in w.pool.residents.values()} == {4, 2}
        await w.pool.release(held)
        await w.pool.release(back)

    run(main())


def test_what_was_found_in_the_store_is_not_evicted_before_it_is_loaded(world: Callable[..., World]) -> None:
    async def main() -> None:
        w = world(capacity=1)
        for text in ("1*a", "1*b"):
            async with w.pool.lease(w.fusion(text)):
                pass
        w.store.budget_bytes = 0
        evict = w.store.evict

        def slow(keep: Collection[str], need: int = 0) -> list[str]:
            time.sleep(0.2)  # while a request asks for what is about to go
            return evict(keep, need)

        w.store.evict = slow  # type: ignore[method-assign]  # a slow disk
        making = asyncio.create_task(w.pool.acquire(w.fusion("1*c")))
        await asyncio.sleep(0.1)
        asked = asyncio.create_task(w.pool.acquire(w.fusion("1*a")))
        for task in (making, asked):
            lease = await task
            assert lease.resident.path.is_dir()
            await w.pool.release(lease)

    run(main())


def test_an_adapter_is_forgotten_while_its_stacks_are_evicted(world: Callable[..., World]) -> None:
    async def main() -> None:
        w = world()
        for text in ("1*a + 1*b", "1*a + 1*c"):
            async with w.pool.lease(w.fusion(text)):
                pass
        unload = w.engine.unload

        async def slow(request: object) -> None:
            await asyncio.sleep(0.1)
            await unload(request)

        w.engine.unload = slow  # type: ignore[method-assign]  # a busy engine
        forgetting = asyncio.create_task(w.pool.forget(w.adapters["a"].digest))
        await asyncio.sleep(0.05)
        (other,) = w.pool.residents.values()
        await asyncio.gather(forgetting, w.pool._evict(other))
        assert not w.pool.residents and not w.engine.loaded

    run(main())


def test_a_failure_keeps_its_reason_and_can_be_tried_again(world: Callable[..., World]) -> None:
    async def main() -> None:
        w = world()
        fusion = w.fusion("1*a + 1*b")
        w.engine.fault = RuntimeError("no room in the worker")
        with pytest.raises(ApiError, match="no room in the worker"):
            await w.pool.acquire(fusion)
        assert w.pool.state(fusion) == ("failed", "no room in the worker")
        w.engine.fault = None
        async with w.pool.lease(fusion) as lease:
            assert lease.source == "loaded"
        assert w.pool.state(fusion) == ("warm", None)

    run(main())


def test_a_full_disk_is_told_without_a_path_and_leaves_nothing(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def main() -> None:
        w = world()

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device", str(tmp_path))

        monkeypatch.setattr("service.pool.save", full)
        with pytest.raises(OSError) as caught:
            await w.pool.acquire(w.fusion("1*a + 1*b"))
        error = api_error(caught.value)
        assert error.status == 507 and "No space left" in error.message and str(tmp_path) not in error.message
        assert not [f for f in (tmp_path / "builds").rglob("*") if f.is_file()]
        assert not w.pool.residents

    run(main())


def test_strict_refuses_what_loses_and_passes_what_does_not(world: Callable[..., World]) -> None:
    async def main() -> None:
        w = world()
        with pytest.raises(ApiError, match="strict"):
            await w.pool.acquire(w.fusion("svd(1*a + 1*b, rank=1)"), strict=True)
        assert all(r.leases == 0 for r in w.pool.residents.values())
        async with w.pool.lease(w.fusion("svd(1*a + 1*b, rank=6)"), strict=True) as lease:
            assert lease.resident.error < 1e-6

    run(main())


def test_a_removed_adapter_leaves_the_engine_once_it_is_idle(world: Callable[..., World]) -> None:
    async def main() -> None:
        w = world()
        lease = await w.pool.acquire(w.fusion("1*a + 1*b"))
        await w.pool.forget(w.adapters["a"].digest)
        assert w.engine.loaded and not w.pool.residents, "the running request keeps what it has"
        async with w.pool.lease(w.fusion("1*b")) as other:
            assert other.resident is not lease.resident
        await w.pool.release(lease)
        assert list(w.engine.loaded) == [other.resident.request]

    run(main())


def test_a_broken_parent_is_an_error_of_its_own(world: Callable[..., World]) -> None:
    async def main() -> None:
        w = world()
        fusion = w.fusion("1*a + 1*b")
        path = w.pool._sources(fusion.parents["a"]) / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(AdapterError):
            await w.pool.acquire(fusion)
        assert w.pool.state(fusion)[0] == "failed"

    run(main())
