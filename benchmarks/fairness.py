"""A quiet tenant beside a noisy one: `python -m benchmarks.fairness [--rounds N] [--streams N] [--url URL --keys A,B]`.

The quiet one asks for one short answer after the other, of a recipe of its own; a figure is the 95th percentile of its
seconds to the first token. Beside it, the noisy one keeps 64 streams of long answers in flight, each of a recipe that
nobody had before, in two stacks by turns. Both figures are taken in alternating pairs on one server. Without `--keys`,
tenants are told apart by their addresses; `--url` measures a server that is there, with an API key of each tenant.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median, quantiles

import httpx

from benchmarks.common import Comparison, alternate, record
from benchmarks.servers import ours
from benchmarks.serving import ENGINE
from benchmarks.traffic import prompt, stream

COMMAND = "python -m benchmarks.fairness"
AIM = 1.5
REQUESTS = 20
"""The quiet tenant's, of one figure."""
SETTLE_S = 5.0
"""Until the noisy one has filled what it may fill."""
_draw = random.Random(0)
RECIPES: tuple[Callable[[], str], ...] = (
    lambda: f"{_draw.random():.6f}*task + {_draw.random():.6f}*safety",
    lambda: f"{_draw.random():.6f}*task",
)


def connect(url: str, address: str, key: str) -> httpx.AsyncClient:
    """A client of one tenant."""
    transport = httpx.AsyncHTTPTransport(local_address=address, limits=httpx.Limits(max_connections=None))
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(base_url=url, timeout=600, transport=transport, headers=headers)


async def ask_quietly(client: httpx.AsyncClient) -> float:
    """95th percentile of the seconds to the first token."""
    firsts = [(await stream(client, f"{_draw.random():.6f}*safety", 4, prompt()))[0] for _ in range(REQUESTS)]
    return quantiles(firsts, n=20)[-1]


async def make_noise(client: httpx.AsyncClient, number: int, seen: Counter[str]) -> None:
    """One long answer after the other, until cancelled, its tokens counted; what is refused is asked again."""
    while True:
        with suppress(RuntimeError, httpx.HTTPError):
            await stream(client, RECIPES[number % len(RECIPES)](), 200, prompt(), seen)
        await asyncio.sleep(0.05)


async def measure(url: str, keys: list[str], streams: int, rates: list[float]) -> float:
    """The quiet tenant's figure beside so many `streams` of the noisy one, whose tokens a second go into `rates`."""
    seen: Counter[str] = Counter()
    async with connect(url, "127.0.0.1", keys[0]) as quiet, connect(url, "127.0.0.2", keys[1]) as noisy:
        tasks = [asyncio.create_task(make_noise(noisy, number, seen)) for number in range(streams)]
        try:
            await asyncio.sleep(SETTLE_S if streams else 0)
            before, began = seen["tokens"], time.perf_counter()
            first = await ask_quietly(quiet)
            rates.append((seen["tokens"] - before) / (time.perf_counter() - began))
            return first
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--url")
    parser.add_argument("--keys", default=",", help="API keys of the quiet tenant and of the noisy one")
    args = parser.parse_args()
    keys = args.keys.split(",")

    def run(url: str) -> Comparison:
        rates: list[float] = []
        sides = alternate(
            lambda: asyncio.run(measure(url, keys, args.streams, rates)),
            lambda: asyncio.run(measure(url, keys, 0, [])),
            args.rounds,
        )
        note = f"the noisy one got {median(rates):.0f} tokens a second meanwhile"
        name = f"a quiet tenant's p95 first token beside {args.streams} streams of another"
        return Comparison(name, "beside the noisy one", "alone", "s", ("<=", AIM), **sides, note=note)

    if args.url:
        print(run(args.url).line())
        return
    with tempfile.TemporaryDirectory() as scratch, ours(ENGINE, Path(scratch)) as server:
        record("fairness.json", COMMAND, [run(server.url)])


if __name__ == "__main__":
    main()
