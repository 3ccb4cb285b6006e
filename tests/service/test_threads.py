"""Threads by kind, and who is who: a call that stalls stops its own kind alone, and nobody waits without end."""

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from service.callers import CALLER, Caller
from service.clients import identify_client
from service.errors import ApiError
from service.threads import ThreadPool, Threads
from service.waits import enter

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


@pytest.fixture
def stalled() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


async def test_a_kind_that_stalls_stops_no_other(stalled: threading.Event) -> None:
    threads = Threads.start(waiting=3, wait_timeout_s=0.5)
    plans = [asyncio.create_task(threads.plans.run(stalled.wait, 30)) for _ in range(5)]
    await asyncio.sleep(0)
    with pytest.raises(ApiError, match="Too many plans are queued") as full:
        await threads.plans.run(time.sleep, 0)
    assert (full.value.status, full.value.headers["retry-after"]) == (503, "5")
    assert await threads.builds.run(lambda: "built") == "built"
    assert await threads.files.run(lambda: "read") == "read"
    while sum(task.done() for task in plans) < 3:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    late = [task for task in plans if task.done()]
    assert len(late) == 3, "two run, the others gave up"
    assert all(isinstance(task.exception(), ApiError) for task in late)
    stalled.set()
    assert await asyncio.gather(*(task for task in plans if task not in late)) == [True, True]
    threads.close()


async def test_a_call_that_nobody_waits_for_never_begins(stalled: threading.Event) -> None:
    pool = ThreadPool("calls", threads=1, waiting=1)
    begun: list[int] = []
    running = asyncio.create_task(pool.run(stalled.wait, 30))
    queued = asyncio.create_task(pool.run(begun.append, 1))
    await asyncio.sleep(0)
    queued.cancel()
    await asyncio.wait([queued])
    stalled.set()
    assert await running
    await pool.run(begun.append, 2)
    assert begun == [2]
    pool.close()


async def test_a_call_that_takes_too_long_is_given_up_and_counts_until_it_ends(stalled: threading.Event) -> None:
    pool = ThreadPool("calls", threads=1, waiting=0, timeout_s=0.05)
    with pytest.raises(ApiError, match=r"The calls took longer than 0.05 s"):
        await pool.run(stalled.wait, 30)
    with pytest.raises(ApiError, match="Too many calls are queued"):
        await pool.run(stalled.wait, 30)
    stalled.set()
    await asyncio.sleep(0.1)
    assert await pool.run(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        await pool.run(lambda: 1 // 0)
    pool.close()


async def test_calls_of_a_server_that_stops_are_told_so(stalled: threading.Event) -> None:
    threads = Threads.start(waiting=9, wait_timeout_s=30)
    calls = [asyncio.create_task(threads.plans.run(stalled.wait, 30)) for _ in range(3)]
    calls += [asyncio.create_task(threads.builds.run(stalled.wait, 30)) for _ in range(9)]
    await asyncio.sleep(0.1)
    threads.close()
    with pytest.raises(ApiError, match="The server is stopping") as caught:
        await threads.plans.run(stalled.wait, 30)
    assert caught.value.status == 503
    stalled.set()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert {str(outcome) for outcome in outcomes} == {"True", str(caught.value)}


async def test_a_lock_is_waited_for_with_an_end() -> None:
    lock = asyncio.Lock()
    async with lock:
        with pytest.raises(ApiError, match=r"Timed out after 0.05 s waiting for other changes; try again.") as caught:
            async with enter(lock, 0.05, "other changes"):
                pass
    assert (caught.value.status, caught.value.headers["retry-after"]) == (503, "5")
    async with enter(lock, 0.05, "other changes"):
        assert lock.locked()
    assert not lock.locked()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("testclient", "testclient", True),
    ],
)
async def test_a_client_without_a_key_is_its_address(one: str, other: str, same: bool) -> None:
    names = [
        identify_client({"type": "http", "client": (host, port), "headers": []})
        for port, host in enumerate((one, other))
    ]
    assert (names[0] == names[1]) is same


async def test_a_client_with_a_key_is_its_key_whatever_its_address() -> None:
    def identify(key: str, host: str) -> str:
        return identify_client({"type": "http", "client": (host, 1), "headers": [], CALLER: Caller(key, "user")})

    assert identify("0f", "a") == identify("0f", "b") != identify("1f", "a")
    assert identify("", "key 0f") == "name key 0f", "no proxy gives anybody the places of a key"
    assert identify_client({"type": "http", "client": None, "headers": []}) == ""


@pytest.mark.parametrize("key", ["0f", ""])
async def test_a_routers_tenants_are_clients_where_the_operator_says_so(key: str) -> None:
    def identify(tenant: bytes, *, fair: bool = True) -> str:
        headers = [(b"x-llm-d-inference-fairness-id", tenant)] if tenant else []
        scope = {"type": "http", "client": ("a", 1), "headers": headers, CALLER: Caller(key)}
        return identify_client(scope, fair=fair)

    assert len({identify(tenant) for tenant in (b"", b"one", b"two")}) == 3
    assert identify(b"one") == identify(b"one")
    assert identify(b"one", fair=False) == identify(b"two", fair=False) == identify(b"", fair=False)
