"""Residency over an engine that can be told to fail: single flight, room, and what is said of failures."""

import asyncio
import time
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from service.errors import ApiError, api_error
from tests.service.conftest import World

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


async def test_many_waiters_share_one_making_and_outlive_the_first(world: Callable[..., World]) -> None:
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
    assert leases[0].resident.leases == 49
    assert len(w.engine.loaded) == 1
    assert w.pool.state(fusion) == ("warm", None)


async def test_eviction_waits_for_leases_and_takes_the_least_recently_used(world: Callable[..., World]) -> None:
    w = world(capacity=2)
    held = await w.pool.acquire(w.fusion("1*a"))
    await w.warm("1*b")
    async with w.pool.lease(w.fusion("1*c")):  # takes b's place, a is in use
        assert {resident.rank for resident in w.residency.residents.values()} == {4, 3}
        waiting = asyncio.create_task(w.pool.acquire(w.fusion("1*b")))
        await asyncio.sleep(0.1)
        assert not waiting.done(), "both places are in use"
    back = await waiting
    assert back.source == "loaded", "its files were kept"
    assert {resident.rank for resident in w.residency.residents.values()} == {4, 2}
    w.pool.release(held)
    w.pool.release(back)


async def test_what_was_found_in_the_store_is_not_evicted_before_it_is_loaded(world: Callable[..., World]) -> None:
    w = world(capacity=1)
    await w.warm("1*a", "1*b")
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
        w.pool.release(lease)


async def test_a_failure_keeps_its_reason_and_can_be_tried_again(world: Callable[..., World]) -> None:
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


async def test_a_full_disk_is_reported_without_a_path_and_leaves_nothing(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    w = world()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr("service.fuser.save", full)
    with pytest.raises(OSError, match="No space left") as caught:
        await w.pool.acquire(w.fusion("1*a + 1*b"))
    error = api_error(caught.value)
    assert error.status == 507
    assert "No space left" in error.message
    assert str(tmp_path) not in error.message
    assert not [file for file in (tmp_path / "builds").rglob("*") if file.is_file()]
    assert not w.residency.residents


async def test_what_is_never_idle_makes_way_once_others_have_waited_for_long(world: Callable[..., World]) -> None:
    w = world(capacity=1, wait_timeout_s=8)
    busy, other = w.fusion("1*a"), w.fusion("1*b")
    await w.warm("1*b", "1*a")
    first = await w.pool.acquire(busy)
    waiting = asyncio.create_task(w.pool.acquire(other))
    await asyncio.sleep(0.3)
    second = await w.pool.acquire(busy)  # at once, though another waits
    assert second.source == "warm"
    w.pool.release(first)
    while w.pool.find_resident(w.pool.find_home(busy)):
        await asyncio.sleep(0.01)
    late = asyncio.create_task(w.pool.acquire(busy))  # behind who has waited for long
    await asyncio.sleep(0.1)
    assert not late.done()
    w.pool.release(second)
    lease = await waiting
    assert not late.done()
    eviction = w.pool.find_eviction(w.pool.find_home(busy))
    assert eviction is not None
    assert (eviction.reason, eviction.wanted_by) == ("room", lease.resident.key)
    w.pool.release(lease)
    w.pool.release(await late)
    assert w.pool.find_eviction(w.pool.find_home(busy)) is None


async def test_what_is_pinned_makes_way_for_nothing(world: Callable[..., World]) -> None:
    w = world(capacity=2, wait_timeout_s=2)
    pinned = w.fusion("1*a")
    await w.warm("1*a")
    w.pool.keep_pinned(lambda: [w.pool.place(pinned).key])
    await w.warm("1*b", "1*c", "1*a + 1*b")
    assert w.pool.state(pinned) == ("warm", None)
    assert w.pool.count_room() == 1
    held = [await w.pool.acquire(w.fusion("1*c")), await w.pool.acquire(pinned)]
    with pytest.raises(ApiError, match="not ready within"):
        await w.pool.acquire(w.fusion("1*b"), client="one")
    assert w.pool.state(pinned) == ("warm", None)
    assert w.pool.state(w.fusion("1*c"))[0] == "evicted", "it serves those that it has, and no new ones"
    for lease in held:
        w.pool.release(lease)
