"""Gaps between tokens while others bring something new: `python -m benchmarks.smooth [--rounds N] [--kinds A,B]`.

Sixteen streams of mixes run all the time. In one phase nobody else comes; in the others somebody asks each second for
one token of something new: weights that nobody had before, a build, a stack. A figure is the 99th percentile of the
gaps of the streams' tokens in a phase, against that of the quiet phase of the same round. Phases change places from
round to round. Builds are sums of two adapters cut to rank 8, stacks are pairs of adapters that no stack had before.

The client runs before the server, where the system lets it: it takes 4 % of one of the cores that it shares with the
server, and the kernel let it wait for one for up to 0.5 s while tokens that had been sent lay in its sockets.
"""

import argparse
import asyncio
import gc
import itertools
import json
import os
import random
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import httpx

from adapters import LoraModule, load, make_adapter, save
from benchmarks.common import BASE_NAME, ROOT, Comparison, record
from benchmarks.servers import ours
from benchmarks.serving import ENGINE, SHIPPED, mixes
from benchmarks.traffic import prompt, stream

COMMAND = "python -m benchmarks.smooth"
STREAMS = 16
VARIANTS = 12
"""Adapters of each kind: their pairs are stacks."""
PERIOD_S, PHASE_S = 1.0, 12.0
AIMS = {"mixes": 1.1, "builds": 1.3, "stacks": 1.3}
NAMES = {"mixes": "a new mix", "builds": "a new build", "stacks": "a new stack"}
QUIET = "nothing"
_draw = random.Random(0)


@dataclass(slots=True)
class Phase:
    """Gaps between the tokens of one stream after the other (seconds), and what came of what was asked beside them."""

    gaps: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    sources: set[str] = field(default_factory=set)

    @property
    def p99(self) -> float:
        """99th percentile of the gaps."""
        return quantiles(self.gaps, n=100)[-1]

    def line(self) -> str:
        """All that is known of it, on one line."""
        firsts = f", {len(self.firsts)} asked beside, first token {median(self.firsts):.2f} s" if self.firsts else ""
        return (
            f"{len(self.gaps)} gaps, median {median(self.gaps) * 1e3:.0f}, p99 {self.p99 * 1e3:.0f}, "
            f"longest {max(self.gaps) * 1e3:.0f} ms{firsts} {sorted(self.sources)}"
        )


def save_variants(folder: Path) -> None:
    """Adapters like the shipped ones, with other digests."""
    for (name, path), i in itertools.product(SHIPPED.items(), range(VARIANTS)):
        modules = load(path).modules.items()
        changed = {key: LoraModule(m.a * (1 + 1e-3 * (i + 1)), m.b, m.scaling) for key, m in modules}
        save(make_adapter(changed, BASE_NAME), folder / f"{name}{i}")


def register_variants(url: str, folder: Path) -> None:
    """Register them all."""
    for name, i in itertools.product(SHIPPED, range(VARIANTS)):
        body = {"name": f"{name}{i}", "path": str(folder / f"{name}{i}")}
        httpx.post(f"{url}/v1/adapters", json=body, timeout=300).raise_for_status()


class Recipes:
    """What nobody has asked for yet, of each kind."""

    def __init__(self) -> None:
        self._pairs = [f"0.6*task{i} + 0.4*safety{j}" for i in range(VARIANTS) for j in range(VARIANTS)]
        _draw.shuffle(self._pairs)

    def draw(self, kind: str) -> str:
        """One of them."""
        if kind == "stacks":
            return self._pairs.pop()
        (mix,) = mixes(1)
        return mix if kind == "mixes" else f"svd({mix}, rank=8)"


async def run_stream(client: httpx.AsyncClient, phase: Phase, begun: asyncio.Event) -> None:
    """One answer that outlives the phase."""
    body = {"model": mixes(1)[0], "prompt": prompt(), "max_tokens": 1800, "temperature": 0, "ignore_eos": True}
    last = 0.0
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                now = time.perf_counter()
                if last:
                    phase.gaps.append(now - last)
                last = now
                begun.set()
    raise RuntimeError(f"a stream ended within its phase: {answer.status_code}")


async def ask_beside(client: httpx.AsyncClient, recipe: str, phase: Phase) -> None:
    """One token of `recipe`."""
    first, _, source = await stream(client, recipe, 1, prompt())
    phase.firsts.append(first)
    phase.sources.add(source)


async def run_phase(url: str, kind: str, recipes: Recipes, seconds: float) -> Phase:
    """The gaps of the streams while one of the `kind` is asked for each second."""
    phase, begun = Phase(), [asyncio.Event() for _ in range(STREAMS)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        streams = [asyncio.create_task(run_stream(client, phase, event)) for event in begun]
        try:
            await asyncio.gather(*(asyncio.wait_for(event.wait(), 60) for event in begun))
            await asyncio.sleep(1)
            phase.gaps.clear()
            beside = []
            for _ in range(round(seconds / PERIOD_S)):
                if kind != QUIET:
                    beside.append(asyncio.create_task(ask_beside(client, recipes.draw(kind), phase)))
                await asyncio.sleep(PERIOD_S)
            result = Phase(list(phase.gaps), phase.firsts, phase.sources)
            await asyncio.gather(*beside)
        finally:
            for task in streams:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
    return result


def take_precedence() -> None:
    """Have this process hold up nothing that it measures, and not be held up itself."""
    gc.collect()
    gc.freeze()  # else looking through all that is imported would take some 0.2 s
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        print("    without CAP_SYS_NICE: gaps hold the client's own waits for a core", flush=True)


def run(url: str, kinds: list[str], rounds: int, seconds: float) -> list[Comparison]:
    """A row for each of `kinds`."""
    take_precedence()
    recipes, found = Recipes(), defaultdict[str, list[Phase]](list)
    order = [QUIET, *kinds]
    for kind in order:  # unmeasured: first times of everything
        asyncio.run(run_phase(url, kind, recipes, 2))
    for _ in range(rounds):
        for kind in order:
            found[kind].append(asyncio.run(run_phase(url, kind, recipes, seconds)))
            print(f"    {kind}: {found[kind][-1].line()}", flush=True)
        order = order[1:] + order[:1]
    quiet = tuple(phase.p99 for phase in found[QUIET])
    return [_compare(kind, found[kind], quiet, found[QUIET]) for kind in kinds]


def _compare(kind: str, phases: list[Phase], quiet: tuple[float, ...], quiets: list[Phase]) -> Comparison:
    middle, still = (median(median(p.gaps) for p in some) * 1e3 for some in (phases, quiets))
    longest, least = (max(max(p.gaps) for p in some) * 1e3 for some in (phases, quiets))
    first = median(first for phase in phases for first in phase.firsts)
    return Comparison(
        f"p99 gap between tokens of {STREAMS} streams, {NAMES[kind]} a second",
        f"with {NAMES[kind]} a second",
        "nobody else",
        "s",
        ("<=", AIMS[kind]),
        tuple(phase.p99 for phase in phases),
        quiet,
        note=f"median gaps {middle:.0f} against {still:.0f} ms, longest {longest:.0f} against {least:.0f} ms; "
        f"the new ones had their first token after {first:.2f} s (median)",
    )


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=PHASE_S, help="of a phase; default: %(default)s")
    parser.add_argument("--kinds", default=",".join(AIMS), help="default: %(default)s")
    parser.add_argument("--try", action="store_true", dest="is_trial", help="print, and record nothing")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout whose server is measured")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    if args.rounds * args.seconds / PERIOD_S + 2 > VARIANTS**2:
        parser.error(f"more than {VARIANTS**2} stacks: take fewer rounds or seconds")
    with tempfile.TemporaryDirectory() as scratch:
        save_variants(Path(scratch) / "variants")
        threads = str(len(os.sched_getaffinity(0)))  # of a trial on some of the cores
        with ours(ENGINE, Path(scratch), args.tree, OMP_NUM_THREADS=threads) as server:
            register_variants(server.url, Path(scratch) / "variants")
            rows = run(server.url, kinds, args.rounds, args.seconds)
    if args.is_trial:
        print(*(row.line() + "\n  " + row.note for row in rows), sep="\n")
    else:
        record("smooth.json", COMMAND, rows)


if __name__ == "__main__":
    main()
