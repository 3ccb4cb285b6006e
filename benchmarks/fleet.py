"""Replicas behind a router: `python -m benchmarks.fleet [residency] [metrics]`.

`residency` simulates arrivals at four replicas with eight stacks each; what is resident is decided by the service's own
code. `metrics` reads `/metrics` and `/v1/models` of a real service with 500 adapters and 200 profiles.
"""

import argparse
import asyncio
import heapq
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import cast

import httpx
import torch
from prometheus_client import CollectorRegistry

from adapters import LoraModule, Recipe, Store, fusion_digest, make_adapter, parse
from benchmarks.common import BASE, RESULTS, Measurement, record, stamp
from benchmarks.servers import ours
from service.attempts import Making
from service.build_files import BuildFiles
from service.evictions import Resident
from service.materializer import Materializer
from service.metrics import Metrics
from service.placement import Limits, home_key, place
from service.records import AdapterRecord, now
from service.registry import Registry
from service.residency import Residency
from service.resolve import Fusion

REPLICAS, STACKS, PROFILES = 4, 8, 50
REQUESTS, WARM_UP = 20_000, 2_000
SECONDS, RATE = 0.5, 16.0
"""How long an answer takes, and how many requests a second there are: two run on each replica."""
LIMITS = Limits(mixing=True, max_rank=64)
COMMAND = "python -m benchmarks.fleet"
ADAPTERS, PUBLISHED, READS = 500, 200, 31


class _Files:
    """A store that has every stack already: what counts is whether one has to be loaded."""

    def __init__(self) -> None:
        self.widths: dict[str, dict[str, int]] = {}

    async def find(self, key: str) -> Path:
        return Path(key)

    async def read(self, path: Path) -> str:
        return json.dumps({"rank": 16, "widths": self.widths[path.parent.name]})


class _Engine:
    """Loads at once."""

    async def load(self, path: Path, name: str) -> str:
        return name

    async def unload(self, request: object) -> None:
        """There is nothing to free."""


class Replica:
    """What one server has resident."""

    def __init__(self) -> None:
        self._files = _Files()
        files = cast(BuildFiles, self._files)
        metrics = Metrics(CollectorRegistry())
        self._residency = Residency(
            _Engine(), files, metrics, capacity=STACKS, max_waiting=REQUESTS, wait_timeout_s=600
        )

    async def begin(self, fusion: Fusion) -> tuple[Resident, bool]:
        """Hold the stack of `fusion`; whether it was there."""
        placement = place(fusion, self._residency.residents.values(), (), LIMITS)
        self._files.widths[placement.key] = dict.fromkeys(placement.digests, 8)
        resident, source = await self._residency.acquire(Making(placement.key, placement.kind, Path.mkdir))
        return resident, source == "warm"

    def end(self, resident: Resident) -> None:
        """Let go of it."""
        self._residency.release(resident)


def make_fusions(stacks: int) -> list[Fusion]:
    """One for each profile, over two adapters: as many pairs of adapters as `stacks`."""
    fusions = []
    for i in range(PROFILES):
        names = [f"a{i % stacks}", f"b{i % stacks}"]
        recipe = parse(f"0.{i + 10}*{names[0]} + 0.5*{names[1]}")
        parents = {name: sha256(name.encode()).hexdigest() for name in names}
        digest = sha256(f"fusion {i}".encode()).hexdigest()
        fusions.append(Fusion(recipe, parents, digest, f"p{i}", ranks=dict.fromkeys(parents.values(), 8)))
    return fusions


def arrivals(pattern: str, draw: random.Random) -> Iterator[int]:
    """The profile of each request: by Zipf's law; with bursts, in which half of 200 requests in a row are for one; or
    with a drift, in which the order of popularity moves by five profiles every 1,000 requests.
    """
    order = list(range(PROFILES))
    draw.shuffle(order)
    weights = [1 / (rank + 1) for rank in range(PROFILES)]
    burst = 0
    for i in itertools.count():
        if pattern == "drift" and i % 1000 == 999:
            order = order[-5:] + order[:-5]
        if pattern == "burst" and i % 500 == 0:
            burst = draw.randrange(PROFILES)
        if pattern == "burst" and i % 500 < 200 and draw.random() < 0.5:
            yield burst
        else:
            yield draw.choices(order, weights)[0]


def route_by_stack(fusion: Fusion) -> int:
    """The replica whose hash with the stack's key is the highest, as a router's consistent hashing chooses one."""
    key = home_key(fusion, (), LIMITS)
    return max(range(REPLICAS), key=lambda i: sha256(f"{i}/{key}".encode()).digest())


def route_at_random(draw: random.Random, fusion: Fusion) -> int:
    """Any replica."""
    return draw.randrange(REPLICAS)


async def finish(replica: Replica, task: asyncio.Task[Resident]) -> None:
    """Let go of a stack as soon as it is there."""
    replica.end(await task)


async def simulate(pattern: str, stacks: int, route: Callable[[Fusion], int], seed: int) -> float:
    """Share of the requests after `WARM_UP` that find their stack resident."""
    draw = random.Random(seed)
    replicas, fusions, hits = [Replica() for _ in range(REPLICAS)], make_fusions(stacks), [0]
    ends: list[tuple[float, int, Replica, asyncio.Task[Resident]]] = []

    async def ask(replica: Replica, fusion: Fusion, *, counted: bool) -> Resident:
        resident, is_warm = await replica.begin(fusion)
        hits[0] += counted and is_warm
        return resident

    now, profiles = 0.0, arrivals(pattern, draw)
    for i in range(REQUESTS + WARM_UP):
        now += draw.expovariate(RATE)
        while ends and ends[0][0] <= now:
            _, number, replica, task = heapq.heappop(ends)
            if task.done():
                replica.end(task.result())
            else:  # it waits for a place
                heapq.heappush(ends, (now + SECONDS, number, replica, task))
                break
        fusion = fusions[next(profiles)]
        replica = replicas[route(fusion)]
        task = asyncio.create_task(ask(replica, fusion, counted=i >= WARM_UP))
        for _ in range(12):  # steps of the loop until it is loaded, if there is a place
            await asyncio.sleep(0)
        heapq.heappush(ends, (now + draw.expovariate(1 / SECONDS), i, replica, task))
    await asyncio.gather(*(finish(replica, task) for *_, replica, task in ends))
    return hits[0] / REQUESTS


def measure_residency() -> None:
    """Record the shares in results/fleet.json."""
    rows = []
    for stacks, pattern in itertools.product((PROFILES, PROFILES // 2, PROFILES // 3), ("zipf", "burst", "drift")):
        routes: dict[str, Callable[[Fusion], int]]
        routes = {"stack": route_by_stack, "random": partial(route_at_random, random.Random(7))}
        shares = {name: asyncio.run(simulate(pattern, stacks, route, 1)) for name, route in routes.items()}
        rows.append({"stacks": stacks, "pattern": pattern, **shares})
        print(rows[-1], flush=True)
    setting = {"replicas": REPLICAS, "places": STACKS, "profiles": PROFILES, "requests": REQUESTS}
    result = {**stamp(f"{COMMAND} residency"), **setting, "shares": rows}
    (RESULTS / "fleet.json").write_text(json.dumps(result, indent=1) + "\n")


def seed(data: Path) -> None:
    """A data folder with adapters, as a server leaves it: to register as many, with a probe of each, takes minutes."""
    data.mkdir()
    draw = torch.Generator().manual_seed(0)
    materializer = Materializer(Store(data / "adapters", budget_bytes=2**40), LIMITS.max_rank)
    registry = Registry(f"sqlite:///{data / 'registry.sqlite'}", timeout_s=60)

    async def add(name: str) -> None:
        factors = (torch.randn(1, 576, generator=draw), torch.randn(192, 1, generator=draw))
        adapter = make_adapter({"model.layers.0.self_attn.v_proj": LoraModule(*factors, 1.0)}, None)
        await asyncio.to_thread(materializer.add, adapter)
        digest = fusion_digest(Recipe.single(name), base=BASE.name, parents={name: adapter.digest})
        info = {"rank": 1, "modules": 1, "bytes": adapter.nbytes, "dtype": "float32", "norm": 1.0}
        await registry.add_adapter(
            AdapterRecord(name, adapter.digest, {**info, "fusion_digest": digest, "effect": 1.0}, now())
        )

    async def add_all() -> None:
        for i in range(ADAPTERS):
            await add(f"adapter-{i}")

    asyncio.run(add_all())
    registry.close()


def fill(http: httpx.Client) -> None:
    """Create profiles, and ask every one once."""
    for i in range(PUBLISHED):
        recipe = f"0.5*adapter-{i} + 0.5*adapter-{i + 1}"
        http.put(f"/v1/fusions/profile-{i}", json={"fusion": recipe}).raise_for_status()
        body = {"model": f"profile-{i}", "prompt": "The oak stool", "max_tokens": 1}
        http.post("/v1/completions", json=body).raise_for_status()


def time_read(http: httpx.Client, path: str, part: str, count: int) -> float:
    """Milliseconds of one answer, which has `part` so many times."""
    began = time.perf_counter()
    answer = http.get(path)
    took = time.perf_counter() - began
    if (found := answer.text.count(part)) != count:
        raise RuntimeError(f"{path} has {part!r} {found} times, expected {count}")
    return 1e3 * took


def measure_metrics() -> None:
    """Record how long `/metrics` and `/v1/models` take, with everything there and nothing running."""
    with tempfile.TemporaryDirectory() as folder:
        seed(Path(folder) / "data")
        with (
            ours(["--max-model-len", "512"], Path(folder), FUSION_ADAPTERS="", FUSION_PROFILES="") as server,
            httpx.Client(base_url=server.url, timeout=120) as http,
        ):
            fill(http)
            measurements = []
            for path, aim, part, count in (
                ("/metrics", 20, 'fusion_time_to_first_token_seconds_count{profile="profile-', PUBLISHED),
                ("/v1/models", 5, '"owned_by"', 1 + ADAPTERS + PUBLISHED),
            ):
                values = tuple(time_read(http, path, part, count) for _ in range(READS + 1))[1:]
                name = f"`{path}` with {ADAPTERS} adapters and {PUBLISHED} profiles"
                measurements.append(Measurement(name, "ms", aim, values))
    record("fleet-metrics.json", f"{COMMAND} metrics", measurements)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"residency": measure_residency, "metrics": measure_metrics}
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[], help="what to measure; all if left out")
    for part in parser.parse_args(argv).parts or parts:
        parts[part]()


if __name__ == "__main__":
    main()
