"""Thousands of requests at once on the CPU engine: some are answered, the others told when to come again, all in time.

`make soak`, docs/reliability.md.
"""

import asyncio
import json
import multiprocessing
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.conftest import BASE_NAME, ROOT, Server, launch, stop, wait_ready
from tests.service.proofs import Limit, make_draw, record, size
from tests.service.test_soak import state

pytestmark = pytest.mark.soak

CLIENTS = size(2_000, 200)
MAX_REQUESTS = size(512, 64)
TOKENS = 8
RECOVERY_S = 10.0
FACTOR = 1.25
"""How much more than the unloaded time a first token may take when the load is over."""


@dataclass
class Tally:
    """What the clients got."""

    statuses: Counter[int] = field(default_factory=Counter)
    refused_s: list[float] = field(default_factory=list)
    answered_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("load")
    process, url = launch(
        folder / "data",
        ROOT / "examples/adapters",
        folder / "log",
        FUSION_ADAPTERS="task=shipped:task,safety=shipped:safety",
        FUSION_MAX_REQUESTS=str(MAX_REQUESTS),
        VLLM_CPU_KVCACHE_SPACE="1",
    )
    try:
        wait_ready(process, url, folder / "log")
        yield Server(url, {}, folder / "data", process, folder / "log")
    finally:
        stop(process)


def make_body(number: int, **more: Any) -> dict[str, Any]:
    """A request for the base, or for weights that no other has."""
    draw = make_draw("load", number)
    model = BASE_NAME if number % 2 else f"{draw.uniform(0, 1):.6f}*task + {draw.uniform(0, 1):.6f}*safety"
    asked = {"model": model, "prompt": f"Note {number}: name three rivers.", "max_tokens": TOKENS, "ignore_eos": True}
    return {**asked, "temperature": 0, **more}


async def insist(http: httpx.AsyncClient, number: int, tally: Tally) -> None:
    """Ask until there is an answer, as often as the server says."""
    while True:
        began = time.monotonic()
        try:
            answer = await http.post("/v1/completions", json=make_body(number))
        except httpx.HTTPError as error:
            tally.faults.append(repr(error))
            return
        seconds = time.monotonic() - began
        tally.statuses[answer.status_code] += 1
        if answer.status_code == 200:
            tally.answered_s.append(seconds)
            return
        if answer.status_code != 429 or not answer.headers.get("retry-after", "").isdigit():
            tally.faults.append(f"{answer.status_code} {answer.text[:200]}")
            return
        tally.refused_s.append(seconds)
        await asyncio.sleep(int(answer.headers["retry-after"]))


async def ask_all(url: str) -> Tally:
    """All clients at once, each with a connection of its own: a pool of thousands takes longer than the server."""
    tally = Tally()
    async with AsyncExitStack() as stack:
        clients = [httpx.AsyncClient(base_url=url, timeout=1800, verify=False) for _ in range(CLIENTS)]
        for client in clients:
            await stack.enter_async_context(client)
        await asyncio.gather(*(insist(client, number, tally) for number, client in enumerate(clients)))
    return tally


def run_clients(url: str) -> Tally:
    """`ask_all`, in a process of its own."""
    return asyncio.run(ask_all(url))


def first_token_s(url: str, number: int) -> float:
    """Seconds to the first token of a stream."""
    began = time.monotonic()
    body = make_body(10**6 + number, stream=True)
    with httpx.Client(base_url=url, timeout=300) as http, http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                return time.monotonic() - began
    raise AssertionError("no token")


@contextmanager
def watch(server: Server) -> Iterator[dict[str, list[float]]]:
    """The server's memory, and how long `/livez` takes, about every second of the block."""
    end, seen = threading.Event(), {"memory_bytes": list[float](), "livez_s": list[float]()}

    def look() -> None:
        while not end.wait(1):
            began = time.monotonic()
            try:
                httpx.get(f"{server.url}/livez", timeout=60).raise_for_status()
                seen["livez_s"].append(time.monotonic() - began)
                seen["memory_bytes"].append(state(server)["memory_bytes"])
            except httpx.HTTPError as error:
                seen["livez_s"].append(float("inf"))
                print("livez", repr(error), flush=True)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        end.set()
        thread.join(120)


def wait_recovery(url: str, unloaded_s: float) -> float:
    """Seconds until a first token takes no longer than before, within `FACTOR`."""
    began = time.monotonic()
    for number in range(100, 10_000):
        if first_token_s(url, number) <= FACTOR * unloaded_s:
            return time.monotonic() - began
        assert time.monotonic() - began < 60, "it has not recovered"
    raise AssertionError


def high(values: list[float], share: float = 0.99) -> float:
    """The quantile, rounded."""
    return round(sorted(values)[int(share * (len(values) - 1))], 2) if values else 0.0


def test_thousands_at_once_are_answered_or_told_when_to_come_again(loaded: Server) -> None:
    [first_token_s(loaded.url, number) for number in range(5)]
    unloaded_s = statistics.median(first_token_s(loaded.url, number) for number in range(10, 21))
    before, limit = state(loaded), Limit()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as clients, watch(loaded) as seen:
        tally = clients.submit(run_clients, loaded.url).result()
        seconds = limit.seconds
        recovery_s = wait_recovery(loaded.url, unloaded_s)
    time.sleep(15)  # memory that was freed is given back every 10 s
    after = state(loaded)
    figures = {
        "base": f"{BASE_NAME}, float32",
        "clients_at_once": CLIENTS,
        "max_requests": MAX_REQUESTS,
        "requests": tally.statuses.total(),
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
        "refused_within_s": {"median": high(tally.refused_s, 0.5), "p99": high(tally.refused_s)},
        "answered_within_s": {"median": high(tally.answered_s, 0.5), "p99": high(tally.answered_s)},
        "livez_longest_s": high(seen["livez_s"], 1),
        "memory_before_bytes": before["memory_bytes"],
        "memory_peak_bytes": max(seen["memory_bytes"]),
        "memory_ratio": round(max(seen["memory_bytes"]) / before["memory_bytes"], 2),
        "memory_after_bytes": after["memory_bytes"],
        "open_files": [before["open_files"], after["open_files"]],
        "unloaded_first_token_s": round(unloaded_s, 3),
        "recovery_s": round(recovery_s, 1),
        "seconds": round(seconds),
    }
    record("load", "test_load.py", figures)
    assert not tally.faults, tally.faults[:5]
    assert tally.statuses[200] == CLIENTS
    assert tally.statuses.keys() == {200, 429}
    assert recovery_s <= RECOVERY_S
    assert after["memory_bytes"] <= 1.1 * before["memory_bytes"] + 2**26
    assert after["open_files"] <= before["open_files"] + 8
