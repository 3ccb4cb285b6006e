"""No client fills the engine: its sequences take a share, the rest of them wait, and others go first."""

import asyncio
import json
import select
import socket
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from typing import Any

import anyio
import httpx
import pytest
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import SamplingParams

from service.engine.turns import Turns, current_client, current_priority, take_turns
from tests.conftest import BASE_NAME, Server
from tests.service.own import wait


class Engine:
    """Generations that run until they are told to end, one after the other."""

    def __init__(self, slots: int) -> None:
        self.turns = Turns(slots)
        self.running: list[tuple[str | None, int, int]] = []
        """Client, sequences and priority."""
        self.end = asyncio.Event()

    async def generate(self, _: Any, params: SamplingParams, *, priority: int) -> AsyncGenerator[int, None]:
        entry = (current_client.get(), params.n, priority)
        self.running.append(entry)
        try:
            yield 1
            await self.end.wait()
        finally:
            self.running.remove(entry)

    async def ask(self, name: str | None, n: int = 1, priority: int = 0) -> None:
        current_client.set(name)
        current_priority.set(priority)
        async for _ in take_turns(self.generate, self.turns)("prompt", SamplingParams(n=n), priority=-99):
            pass

    def count(self, name: str | None) -> int:
        return sum(n for client, n, _ in self.running if client == name)


@pytest.mark.anyio
@pytest.mark.usefixtures("time_limit")
async def test_one_client_takes_three_quarters_of_the_engine_and_the_rest_waits() -> None:
    engine = Engine(16)
    tasks = [asyncio.create_task(engine.ask("one")) for _ in range(40)]
    await anyio.sleep(0.05)
    assert engine.count("one") == 12
    tasks += [asyncio.create_task(engine.ask(name, n)) for name, n in (("other", 4), (None, 1), (None, 20))]
    await anyio.sleep(0.05)
    assert (engine.count("other"), engine.count(None)) == (4, 21)
    for task in tasks[12:20]:  # those that wait may leave
        task.cancel()
    engine.end.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not engine.running
    assert not engine.turns._used  # noqa: SLF001 - nothing is kept of clients that have nothing
    assert not engine.turns._lines  # noqa: SLF001 - as above


@pytest.mark.anyio
@pytest.mark.usefixtures("time_limit")
async def test_what_is_more_urgent_goes_before_clients_with_few() -> None:
    engine = Engine(1000)
    tasks = []
    for name, priority in (("one", 1), ("one", 1), ("other", 0), ("third", -1)):
        tasks.append(asyncio.create_task(engine.ask(name, priority=priority)))
        await anyio.sleep(0.01)
    order = sorted(engine.running, key=lambda entry: entry[2])  # vLLM takes the smallest first
    assert [name for name, _, _ in order] == ["one", "one", "other", "third"]
    engine.end.set()
    await asyncio.gather(*tasks)


@pytest.mark.anyio
@pytest.mark.usefixtures("time_limit")
async def test_clients_with_few_go_first_whatever_they_say() -> None:
    engine = Engine(1000)
    tasks = []
    for name, n in (("one", 100), ("one", 1), ("one", 1), ("other", 1), (None, 1)):
        tasks.append(asyncio.create_task(engine.ask(name, n)))
        await anyio.sleep(0.01)
    assert [priority for _, _, priority in engine.running] == [0, 7, 7, 0, 0]
    engine.end.set()
    await asyncio.gather(*tasks)


@pytest.mark.anyio
@pytest.mark.usefixtures("time_limit")
async def test_large_requests_get_their_turn_among_small_ones() -> None:
    engine = Engine(16)
    large = [asyncio.create_task(engine.ask("one", n)) for n in (8, 8)]
    await anyio.sleep(0.01)
    small = [asyncio.create_task(engine.ask("one")) for _ in range(3)]
    await anyio.sleep(0.01)
    assert engine.count("one") == 8
    large[1].cancel()  # the first in line leaves, and the others go ahead
    await anyio.sleep(0.01)
    assert engine.count("one") == 11
    engine.end.set()
    await asyncio.gather(*large, *small, return_exceptions=True)
    with pytest.raises(VLLMClientError, match="12 answers at once"):
        await engine.ask("one", 13)


def count_running(http: httpx.Client) -> float:
    """Sequences that the engine computes at once."""
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


def test_one_client_s_answers_keep_nobody_waiting(server: Server) -> None:
    crowd = {"model": BASE_NAME, "prompt": ["x"] * 300, "max_tokens": 2000, "ignore_eos": True}
    few = {"model": BASE_NAME, "prompt": "y", "max_tokens": 2}
    content, address = json.dumps(crowd), httpx.URL(server.url)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {address.netloc.decode()}\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(content)}\r\n\r\n{content}".encode()
    transport = httpx.HTTPTransport(local_address="127.0.0.2")
    with ExitStack() as stack:
        other = stack.enter_context(httpx.Client(base_url=server.url, timeout=40, transport=transport))
        floods = [stack.enter_context(socket.create_connection((address.host, address.port or 80))) for _ in range(4)]
        for flood in floods:
            flood.sendall(request)
        wait(lambda: count_running(other) == 48, 60)  # three quarters of the engine
        start = time.monotonic()
        assert other.post("/v1/completions", json=few).status_code == 200
        assert time.monotonic() - start < 15
        answers = select.poll()
        for flood in floods:
            answers.register(flood, select.POLLIN)
        assert answers.poll(0) == [], "they took all the time"
