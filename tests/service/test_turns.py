"""No client fills the engine: its sequences take a share, the rest of them wait, and others go first."""

import asyncio
import json
import select
import socket
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import pytest
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import SamplingParams

from service.engine.turns import ANSWER, CROWD, OUTPUT, Turns, current_client, current_priority, take_turns
from tests.conftest import BASE_NAME, Server
from tests.service.own import wait


class Engine:
    """Generations that run until they are told to end, one after the other."""

    def __init__(self, slots: int) -> None:
        self.turns = Turns(slots)
        self.running: list[tuple[str | None, int, int]] = []
        """Client, sequences, and what the engine orders by."""
        self.alone: set[str | None] = set()
        """Clients with a request that begins in a step without a crowd."""
        self.end = asyncio.Event()
        self.loaded: list[Any] = []
        self.tokens = 1
        """Of each answer."""

    async def generate(
        self, _: Any, params: SamplingParams, *, priority: int, lora_request: Any = None
    ) -> AsyncGenerator[Any, None]:
        entry = (current_client.get(), params.n, priority // 2)
        if priority % 2 == 0:
            self.alone.add(current_client.get())
        self.running.append(entry)
        try:
            while lora_request is not None and lora_request not in self.loaded:  # it waits for a slot
                await asyncio.sleep(0.001)
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * self.tokens)] * params.n)
            await self.end.wait()
        finally:
            self.running.remove(entry)

    async def ask(self, name: str | None, n: int = 1, priority: int = 0, lora: Any = None) -> None:
        current_client.set(name)
        current_priority.set(priority)
        generate = take_turns(self.generate, self.turns)
        async for _ in generate({"prompt_token_ids": [1] * 10}, SamplingParams(n=n), priority=-99, lora_request=lora):
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
    assert not engine.turns._clients  # noqa: SLF001 - nothing is kept of clients that have nothing
    assert not engine.turns._adapters  # noqa: SLF001 - as above


@pytest.mark.anyio
@pytest.mark.usefixtures("time_limit")
async def test_beside_a_crowd_the_requests_of_others_begin_without_it() -> None:
    engine = Engine(1000)
    engine.end.set()
    keep = Engine(1000)
    keep.turns, keep.alone = engine.turns, engine.alone
    crowd = [asyncio.create_task(keep.ask("crowd")) for _ in range(CROWD - 1)]
    await anyio.sleep(0.01)
    await engine.ask("few")
    assert not engine.alone, "they are not many"
    crowd.append(asyncio.create_task(keep.ask("crowd")))
    await anyio.sleep(0.01)
    for name, n in (("few", 1), ("crowd", 1), (None, 1), ("many", CROWD + 1)):
        await engine.ask(name, n)
    assert engine.alone == {"few"}
    keep.end.set()
    await asyncio.gather(*crowd)


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
    answer = 10 + OUTPUT * ANSWER
    first = 10 + 100 * OUTPUT * ANSWER
    assert [priority for _, _, priority in engine.running] == [0, first, first + answer, 0, 0]
    engine.end.set()
    await asyncio.gather(*tasks)


@pytest.mark.anyio
@pytest.mark.usefixtures("time_limit")
async def test_clients_are_ordered_by_what_they_have_had_and_none_saves_up() -> None:
    engine = Engine(1000)
    keep = asyncio.create_task(engine.ask("kept busy"))
    await anyio.sleep(0.01)
    for name, tokens in (("long", 500), ("short", 5), ("long", 500), ("short", 5)):
        engine.tokens, engine.end = tokens, asyncio.Event()
        engine.end.set()
        await engine.ask(name)
    engine.end = asyncio.Event()
    tasks = []
    for name in ("long", "short", "new"):
        tasks.append(asyncio.create_task(engine.ask(name)))
        await anyio.sleep(0.01)
    starts = {client: priority for client, _, priority in engine.running}
    assert starts["long"] - starts["short"] == 2 * OUTPUT * (500 - 5), "an answer's token counts twice"
    assert starts["new"] == starts["kept busy"] == 0
    for task in (keep, tasks[1], tasks[2]):
        task.cancel()
    await asyncio.gather(keep, *tasks[1:], return_exceptions=True)
    tasks.append(asyncio.create_task(engine.ask("newer")))
    await anyio.sleep(0.01)
    starts = {client: priority for client, _, priority in engine.running}
    assert starts["newer"] == starts["long"] > 0, "whoever was away has saved up nothing"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.anyio
@pytest.mark.usefixtures("time_limit")
@pytest.mark.parametrize("slots", [1, 2])
async def test_a_client_that_waits_for_a_slot_gets_the_next_one(slots: int) -> None:
    engine = Engine(1000)
    engine.turns = Turns(1000, slots)
    loras = [SimpleNamespace(lora_int_id=number) for number in range(slots + 1)]
    engine.loaded = loras[:slots]
    noisy = [asyncio.create_task(engine.ask("noisy", lora=lora)) for lora in loras[:slots] for _ in range(3)]
    await anyio.sleep(0.01)
    quiet = asyncio.create_task(engine.ask("quiet", lora=loras[-1]))
    await anyio.sleep(0.01)
    late = [asyncio.create_task(engine.ask("noisy", lora=lora)) for lora in (*loras, None)]
    await anyio.sleep(0.01)
    assert engine.count("noisy") == 3 * slots, "they would keep the slots"
    assert engine.count("quiet") == 1
    for task in noisy[:3]:  # those of one slot end
        task.cancel()
    await asyncio.gather(*noisy[:3], return_exceptions=True)
    engine.loaded = loras[1:]
    await anyio.sleep(0.02)
    assert engine.count("noisy") == 3 * slots - 3 + len(late), "there is a slot for each"
    engine.loaded = loras
    engine.end.set()
    await asyncio.gather(quiet, *noisy[3:], *late)


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


@pytest.mark.anyio
@pytest.mark.usefixtures("time_limit")
async def test_a_client_that_has_waited_for_a_slot_keeps_others_of_its_own_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.engine.turns.PATIENCE_S", 0.2)
    engine = Engine(1000)
    engine.turns = Turns(1000, slots=1)
    warm, cold = SimpleNamespace(lora_int_id=1), SimpleNamespace(lora_int_id=2)
    engine.loaded.append(warm)
    tasks = [asyncio.create_task(engine.ask("one", lora=lora)) for lora in (warm, cold, warm)]
    await anyio.sleep(0.1)
    assert engine.count("one") == 3, "what has its slot goes first"
    await anyio.sleep(0.2)
    tasks.append(asyncio.create_task(engine.ask("one", lora=warm)))
    await anyio.sleep(0.05)
    assert engine.count("one") == 3, "one has waited for long"
    engine.loaded.append(cold)
    await anyio.sleep(0.05)
    assert engine.count("one") == 4
    engine.end.set()
    await asyncio.gather(*tasks)
