"""Whoever waits for a stack or build gets an answer in time, and takes nothing along: engine-free, fault by fault."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from adapters import fuse
from service import fuser, residency
from service.errors import ApiError
from service.places import Places
from tests.service.conftest import World

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


async def wait_until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def refusal(w: World, text: str, client: str = "one") -> ApiError:
    """Why a request of `client` gets no lease."""
    with pytest.raises(ApiError) as caught:
        await w.pool.acquire(w.fusion(text), client=client)
    return caught.value


def refusals(w: World, reason: str) -> float:
    return w.series.get_sample_value("fusion_refusals_total", {"reason": reason}) or 0


async def test_a_request_for_a_place_is_refused_in_time_and_leaves_the_line(world: Callable[..., World]) -> None:
    w = world(capacity=1)
    await w.warm("1*b")  # its files are there
    held = await w.pool.acquire(w.fusion("1*a"))
    w.hurry(0.5)
    began = time.monotonic()
    error = await refusal(w, "1*b")
    assert (error.status, error.headers["retry-after"]) == (503, "5")
    assert "all places of the engine were in use" in error.message
    assert time.monotonic() - began < 5
    assert w.pool.state(w.fusion("1*b")) == ("evicted", None), "nothing goes on waiting"
    assert (refusals(w, "timeout"), w.series.get_sample_value("fusion_waiting_requests")) == (1, 0)
    w.pool.release(held)
    async with w.pool.lease(w.fusion("1*b")) as lease:
        assert lease.source == "loaded"
    w.pool.release(await w.pool.acquire(w.fusion("1*a")))


async def test_others_need_not_wait_behind_one_who_waits_for_a_place(world: Callable[..., World]) -> None:
    w = world(capacity=1)
    held = await w.pool.acquire(w.fusion("1*a"))
    waiting = asyncio.create_task(w.pool.acquire(w.fusion("1*b")))
    await wait_until(lambda: w.residency._places.wanted)  # noqa: SLF001 - it shows nowhere else
    async with asyncio.timeout(5), w.pool.lease(w.fusion("2*a")) as lease:
        assert lease.source == "warm"
    assert not waiting.done()
    w.pool.release(held)
    w.pool.release(await waiting)


async def test_no_more_than_the_limit_wait_and_each_counts(world: Callable[..., World]) -> None:
    w = world(max_waiting=3)
    w.engine.wait = asyncio.Event()
    waiting = [asyncio.create_task(w.pool.acquire(w.fusion(text))) for text in ("1*a", "1*a", "1*b")]
    await asyncio.sleep(0)
    for text in ("1*a", "1*c"):
        error = await refusal(w, text)
        assert (error.status, error.headers["retry-after"]) == (503, "5")
        assert "FUSION_MAX_WAITING" in error.message
    assert refusals(w, "queue") == 2
    w.engine.wait.set()
    for lease in await asyncio.gather(*waiting):
        w.pool.release(lease)
    await w.warm("1*c")


async def test_one_client_cannot_take_all_places(world: Callable[..., World]) -> None:
    w = world(capacity=3, client_places=2)
    leases = [await w.pool.acquire(w.fusion(text), client="one") for text in ("1*a", "1*b", "2*b")]
    error = await refusal(w, "1*c")
    assert (error.status, error.headers["retry-after"], refusals(w, "client")) == (429, "5", 1)
    async with w.pool.lease(w.fusion("1*c"), client="other"), w.pool.lease(w.fusion("1*c")):
        pass
    w.pool.release(leases[0])
    async with w.pool.lease(w.fusion("1*c"), client="one"):
        pass


async def test_a_place_that_a_client_waited_for_in_vain_does_not_count(world: Callable[..., World]) -> None:
    w = world(capacity=1, client_places=1)
    held = await w.pool.acquire(w.fusion("1*a"), client="other")
    w.hurry(0.1)
    for text in ("1*b", "1*c"):
        assert (await refusal(w, text)).status == 503
    w.pool.release(held)


async def test_one_client_cannot_fill_the_queue(world: Callable[..., World]) -> None:
    w = world(max_waiting=8)
    w.engine.wait = asyncio.Event()
    fusion = w.fusion("1*a")
    waiting = [asyncio.create_task(w.pool.acquire(fusion, client="one")) for _ in range(7)]
    await asyncio.sleep(0)
    assert (await refusal(w, "1*a")).status == 429
    waiting.append(asyncio.create_task(w.pool.acquire(w.fusion("1*b"), client="other")))
    w.engine.wait.set()
    for lease in await asyncio.gather(*waiting):
        w.pool.release(lease)
    async with w.pool.lease(fusion, client="one"):
        pass


async def test_a_build_that_takes_long_is_finished_for_who_asks_again(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world(wait_timeout_s=1)
    goes_on = threading.Event()

    def fuse_slowly(*args: Any, **options: Any) -> Any:
        goes_on.wait(20)
        return fuse(*args, **options)

    monkeypatch.setattr(fuser, "fuse", fuse_slowly)
    fusion = w.fusion("svd(1*a + 1*b, rank=2)")
    error = await refusal(w, "svd(1*a + 1*b, rank=2)")
    assert (error.status, error.headers["retry-after"]) == (503, "5")
    assert "it is still being made; ask for it again" in error.message
    assert w.pool.state(fusion)[0] == "fusing"
    goes_on.set()
    await wait_until(lambda: w.pool.state(fusion)[0] == "evicted")
    assert not w.engine.loaded, "nobody waits for it"
    w.hurry(30)
    async with w.pool.lease(fusion) as lease:
        assert lease.source == "loaded"


async def test_a_build_whose_turn_has_not_come_is_dropped_with_its_requests(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world(wait_timeout_s=0.3)
    goes_on, built = threading.Event(), []

    def fuse_slowly(*args: Any, **options: Any) -> Any:
        built.append(args)
        goes_on.wait(20)
        return fuse(*args, **options)

    monkeypatch.setattr(fuser, "fuse", fuse_slowly)
    many = [refusal(w, f"svd({i + 1}*a, rank=2)") for i in range(9)]
    assert [error.status for error in await asyncio.gather(*many)] == [503] * 9
    goes_on.set()
    await wait_until(lambda: not w.residency._attempts.stages)  # noqa: SLF001 - it shows nowhere else
    assert len(built) <= 4, "no more than there are threads"


async def test_loading_goes_on_without_its_requests(world: Callable[..., World]) -> None:
    w = world(wait_timeout_s=1)
    w.engine.wait = asyncio.Event()
    fusion = w.fusion("1*a")
    error = await refusal(w, "1*a")
    assert "it is still being made; ask for it again" in error.message
    w.engine.wait.set()
    await wait_until(lambda: w.pool.state(fusion)[0] == "warm")


async def test_the_server_itself_is_patient(world: Callable[..., World]) -> None:
    w = world(wait_timeout_s=0.1)
    w.engine.wait = asyncio.Event()
    warming = asyncio.create_task(w.warm("1*a"))
    await asyncio.sleep(0.5)
    w.engine.wait.set()
    await warming


async def test_places_are_given_in_turn(world: Callable[..., World]) -> None:
    w = world(capacity=1)
    await w.warm("1*a", "1*b", "1*c")
    held = await w.pool.acquire(w.fusion("1*a"))
    served: list[str] = []

    async def use(text: str) -> None:
        async with w.pool.lease(w.fusion(text)):
            served.append(text)

    users = []
    for wanted, text in enumerate(("1*b", "1*c", "1*a + 1*b"), start=1):
        users.append(asyncio.create_task(use(text)))
        await wait_until(lambda wanted=wanted: w.residency._places.wanted == wanted)  # type: ignore[misc]  # noqa: SLF001 - as above
    w.pool.release(held)
    await asyncio.gather(*users)
    assert served == ["1*b", "1*c", "1*a + 1*b"]


async def test_what_was_made_is_leased_before_anyone_can_evict_it(world: Callable[..., World]) -> None:
    w = world(capacity=1)
    texts = ["1*a", "1*b", "1*c"] * 5
    async with asyncio.timeout(30):
        for lease in asyncio.as_completed([w.pool.acquire(w.fusion(text)) for text in texts]):
            w.pool.release(await lease)
    assert len(w.residency.residents) == 1


async def test_a_request_that_goes_as_it_is_served_gives_its_lease_back(world: Callable[..., World]) -> None:
    w = world()
    w.engine.wait = asyncio.Event()
    going = asyncio.create_task(w.pool.acquire(w.fusion("1*a"), client="one"))
    await wait_until(lambda: w.pool.state(w.fusion("1*a"))[0] == "loading")
    w.engine.wait.set()
    while not w.residency.residents:
        await asyncio.sleep(0)
    going.cancel()
    await asyncio.wait([going])
    assert [resident.leases for resident in w.residency.residents.values()] == [int(not going.cancelled())]


@pytest.mark.parametrize("hangs", [False, True])
async def test_an_engine_that_does_not_unload_costs_no_place(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    monkeypatch.setattr(residency, "ENGINE_TIMEOUT_S", 0.2)
    w = world(capacity=1)
    await w.warm("1*a")
    w.engine.unload_fault = RuntimeError("busy")
    if hangs:
        w.engine.unload = lambda _: asyncio.sleep(3600)  # type: ignore[method-assign,assignment]  # an engine that hangs
    await w.warm("1*b")
    assert len(w.residency.residents) == 1


async def test_an_engine_that_does_not_load_ends_the_requests_and_costs_no_place(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "ENGINE_TIMEOUT_S", 0.2)
    w = world(capacity=1)
    w.engine.wait = asyncio.Event()
    error = await refusal(w, "1*a")
    assert error.status == 500
    w.engine.wait.set()
    await w.warm("1*a", "1*b")


async def test_who_leaves_the_line_takes_no_place() -> None:
    places = Places(1)
    await places.take()
    line = [asyncio.create_task(places.take()) for _ in range(3)]
    await asyncio.sleep(0)
    line[0].cancel()
    places.give_back()  # to the second
    line[1].cancel()  # in that moment: to the third
    await asyncio.wait(line)
    assert [task.cancelled() for task in line] == [True, True, False]
    places.give_back()
    assert (places.free, places.wanted) == (1, 0)
