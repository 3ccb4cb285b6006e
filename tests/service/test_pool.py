"""The pool: which fusions share what in the engine, and what a lease says of it."""

from collections.abc import Callable

import pytest

from adapters import load
from service.errors import ApiError
from service.functions import Spans
from service.pool import Lease
from service.residency import ADAPTER
from tests.service.conftest import World


def spans(lease: Lease) -> Spans:
    assert isinstance(lease.weights, tuple)
    return lease.weights


pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


async def test_all_weights_of_a_pair_share_one_stack(world: Callable[..., World]) -> None:
    w = world()
    for i in range(20):
        async with w.pool.lease(w.fusion(f"0.{i}*a + -1.{i}*b")) as lease:
            assert (lease.mode, lease.rank) == ("mixed", 6)
            assert dict(spans(lease)) == {4: float(f"0.{i}"), 2: float(f"-1.{i}")}
    assert len(w.engine.loaded) == 1


async def test_part_of_a_resident_stack_needs_no_stack_of_its_own(world: Callable[..., World]) -> None:
    w = world(groups=("a+b+c",))
    async with w.pool.lease(w.fusion("1*a + 2*b")) as lease:
        assert sorted(weight for _, weight in spans(lease)) == [0, 1, 2]
        assert (lease.rank, lease.resident.rank) == (6, 9)
    async with w.pool.lease(w.fusion("3*c")) as lease:
        assert lease.source == "warm"


async def test_a_declared_group_serves_its_adapters_even_where_a_smaller_stack_is(world: Callable[..., World]) -> None:
    groups: list[str] = []
    w = world(groups=groups)
    await w.warm("1*a")  # registered alone, before the group is complete
    groups.append("a+b+c")
    async with w.pool.lease(w.fusion("1*a")) as one, w.pool.lease(w.fusion("1*b + 1*c")) as other:
        assert one.resident is other.resident
        assert one.resident.rank == 9


async def test_a_busy_stack_is_joined_and_of_idle_ones_the_smallest_serves(world: Callable[..., World]) -> None:
    w = world()
    await w.warm("1*a", "1*a + 1*b")
    async with w.pool.lease(w.fusion("2*a")) as lease:
        assert lease.resident.rank == 4
    async with w.pool.lease(w.fusion("3*a + 1*b")) as pair, w.pool.lease(w.fusion("2*a")) as lease:
        assert lease.resident is pair.resident
    assert len(w.engine.loaded) == 2


@pytest.mark.parametrize("groups", [(), ("a+b+c",)])
async def test_a_plan_refuses_weights_that_a_request_is_refused_for(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, groups: tuple[str, ...]
) -> None:
    w = world(groups=groups)
    small, large = w.fusion("1*a + 1*b"), w.fusion("{*.mlp.*: 0.5, *: 1}*a + 1*b")
    monkeypatch.setattr("service.engine.weights.MAX_BYTES", 16)
    await w.pool.check_weights(small, w.pool.place(small), None)
    with pytest.raises(ApiError, match="bytes of weights, the limit is 16"):
        await w.pool.check_weights(large, w.pool.place(large), None)
    with pytest.raises(ApiError, match="bytes of weights, the limit is 16"):
        await w.pool.acquire(large)


@pytest.mark.parametrize(
    ("text", "mixing"), [("1*a + 1*d", True), ("svd(1*a + 1*b, rank=2)", True), ("1*a + 1*b", False)]
)
async def test_what_cannot_be_mixed_is_built_within_the_rank_limit(
    world: Callable[..., World], text: str, mixing: bool
) -> None:
    w = world(mixing=mixing)
    async with w.pool.lease(w.fusion(text)) as lease:
        assert lease.mode == "built"
        assert lease.rank <= 16
        assert load(lease.resident.path / ADAPTER).rank == lease.rank


async def test_strict_refuses_what_loses_and_passes_what_does_not(world: Callable[..., World]) -> None:
    w = world()
    with pytest.raises(ApiError, match="strict"):
        await w.pool.acquire(w.fusion("svd(1*a + 1*b, rank=1)"), strict=True)
    assert all(resident.leases == 0 for resident in w.residency.residents.values())
    async with w.pool.lease(w.fusion("svd(1*a + 1*b, rank=6)"), strict=True) as lease:
        assert lease.resident.error < 1e-6


async def test_a_removed_adapter_leaves_the_engine_once_it_is_idle(world: Callable[..., World]) -> None:
    w = world()
    lease = await w.pool.acquire(w.fusion("1*a + 1*b"))
    w.pool.forget(w.adapters["a"].digest)
    assert w.engine.loaded, "the running request keeps what it has"
    assert not w.residency.residents
    async with w.pool.lease(w.fusion("1*b")) as other:
        assert other.resident is not lease.resident
    w.pool.release(lease)
    await w.settle()
    assert list(w.engine.loaded) == [other.resident.request]


async def test_a_damaged_parent_fails_with_its_own_error(world: Callable[..., World]) -> None:
    w = world()
    fusion = w.fusion("1*a + 1*b")
    path = w.materializer.sources.root / fusion.parents["a"] / "adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ApiError, match="The stored files of adapter '.*' are damaged.*ends inside its header"):
        await w.pool.acquire(fusion)
    assert w.pool.state(fusion)[0] == "failed"
