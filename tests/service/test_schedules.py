"""Random orders of asking, leaving, failing and retiring: no lease is lost, no wait endless, no place taken twice."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from adapters import Store
from service import residency
from service.attempts import Making
from service.build_files import BuildFiles
from service.clients import ClientPlaces
from service.errors import ApiError
from service.metrics import Metrics
from service.residency import REPORT, Residency
from service.threads import Threads

CAPACITY, KEYS, REQUESTS = 3, [f"{digit}" * 16 for digit in "123456"], 40
WAIT_S, ENGINE_S = 0.15, 0.05


@dataclass
class Engine:
    """Loads and unloads in random time, and at times fails or hangs."""

    draw: random.Random
    held: Counter[str] = field(default_factory=Counter)
    in_use: set[object] = field(default_factory=set)

    async def _work(self) -> None:
        if self.draw.random() < 0.1:
            await asyncio.sleep(3600)
        await asyncio.sleep(self.draw.choice([0, 0.001, 0.01]))
        if self.draw.random() < 0.1:
            raise RuntimeError("a worker failed")

    async def load(self, path: Path, name: str) -> str:
        await self._work()
        self.held[name] += 1
        assert self.held.total() <= CAPACITY
        return name

    async def unload(self, request: object) -> None:
        self.held[str(request)] -= 1  # the engine drops by itself what it fails to unload
        await self._work()


@dataclass
class Run:
    """One random run."""

    draw: random.Random
    engine: Engine
    residency: Residency
    clients: ClientPlaces
    answers: Counter[str] = field(default_factory=Counter)

    def write(self, entry: Path) -> None:
        if self.draw.random() < 0.1:
            raise OSError(5, "a disk that fails")
        (entry / REPORT).write_text(json.dumps({"rank": 1}))

    async def request(self) -> None:
        key, client = self.draw.choice(KEYS), self.draw.choice(["one", "other", None])
        await asyncio.sleep(self.draw.random() * 0.1)
        try:
            self.clients.take(client, key)
        except ApiError:
            self.answers["429"] += 1
            return
        try:
            resident, _ = await self.residency.acquire(Making(key, "build", self.write))
            try:
                assert self.engine.held[str(resident.request)], "what is leased is in the engine"
                await asyncio.sleep(self.draw.choice([0, 0.01, 0.1, 0.3]))
                assert self.engine.held[str(resident.request)]
            finally:
                self.residency.release(resident)
            self.answers["200"] += 1
        except ApiError as error:
            self.answers[str(error.status)] += 1
        except OSError:
            self.answers["507"] += 1
        finally:
            self.clients.give_back(client, key)

    async def play(self) -> None:
        requests = [asyncio.create_task(self.request()) for _ in range(REQUESTS)]
        while not all(request.done() for request in requests):
            if self.draw.random() < 0.3:
                self.draw.choice(requests).cancel()
            if self.draw.random() < 0.3:
                self.residency.retire([self.draw.choice(KEYS)])
            await asyncio.sleep(self.draw.choice([0, 0.001, 0.02]))
        results = await asyncio.gather(*requests, return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results), results


async def run(seed: int, folder: Path) -> Run:
    draw, metrics = random.Random(seed), Metrics(CollectorRegistry())
    threads = Threads.start(waiting=10, wait_timeout_s=WAIT_S)
    engine, files = Engine(draw), BuildFiles(Store(folder / str(seed), budget_bytes=40), threads)
    options = {"capacity": CAPACITY, "max_waiting": 10}
    residents = Residency(engine, files, metrics, wait_timeout_s=WAIT_S, **options)  # type: ignore[arg-type]  # a dict of ints
    play = Run(draw, engine, residents, ClientPlaces(metrics, limit=2, max_waiting=10))
    try:
        async with asyncio.timeout(30):
            await play.play()
            while residents._attempts.stages or residents._freeing:  # noqa: SLF001 - they show nowhere else
                await asyncio.sleep(0.005)
    finally:
        threads.close()
    return play


async def run_all(seeds: Iterable[int], folder: Path) -> list[Run]:
    """Side by side: most of a run is waiting."""
    return await asyncio.gather(*(run(seed, folder) for seed in seeds))


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_any_order_ends_with_every_lease_given_back(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "ENGINE_TIMEOUT_S", ENGINE_S)
    answers: Counter[str] = Counter()
    for played in asyncio.run(run_all(range(first, first + 10), tmp_path)):
        end = played.residency
        assert all(resident.leases == 0 for resident in end.residents.values())
        assert not end._draining  # noqa: SLF001 - as above
        assert end._places.free + len(end.residents) == CAPACITY  # noqa: SLF001 - as above
        assert (end._places.wanted, end._attempts._waiting) == (0, 0)  # noqa: SLF001 - as above
        assert not played.clients._uses  # noqa: SLF001 - as above
        answers += played.answers
    assert {"200", "429", "500", "503", "507"} <= answers.keys()
