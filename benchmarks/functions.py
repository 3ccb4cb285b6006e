"""Weights that are functions: `python -m benchmarks.functions [--rows tables,positions,…]`.

Both sides are asked of one server in turn, except for `build`, whose peer is a server with FUSION_MIXED=off. No recipe
and no prompt is used twice, except where a side says so.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import httpx

from benchmarks.common import BASE_NAME, PAIRS, ROOT, Comparison, alternate, record
from benchmarks.servers import RunningServer, ours
from benchmarks.serving import ENGINE, LOADS, mixes
from benchmarks.traffic import WORDS, first_token, throughput

COMMAND = "python -m benchmarks.functions"
ROWS = ("tables", "positions", "gates", "base", "first", "build", "sweep", "cached", "gate")
GATE = ROOT / "examples/adapters/risk"
LONG = 700
"""Words of a long prompt, about 1,000 tokens."""
POINTS, PROMPTS, TOKENS = 21, 4, 4
"""Of the sweep."""
_draw = random.Random(1)


def compare(row: Callable[..., Comparison], mine: Callable[[], float], peer: Callable[[], float], pairs: int) -> None:
    """Measure both sides in turn and record the row, which lacks nothing but the values."""
    record("functions.json", COMMAND, [row(**alternate(mine, peer, pairs))])


def number() -> str:
    """A weight that no other recipe has."""
    return f"{_draw.uniform(0.1, 1):.6f}"


def by_module(n: int) -> list[str]:
    """`n` recipes whose tables differ in every layer."""
    return [
        f"{{*.mlp.*: {number()}, *.q_proj: ramp({number()}..{number()}), *: {number()}}}*safety + "
        f"ramp({number()}..{number()})*task"
        for _ in range(n)
    ]


def by_position(n: int) -> list[str]:
    """`n` recipes of which a half has three phases and a half has eight."""
    return [
        f"{number()}*task + steps(prompt: {number()}, 0: {number()}, 4: {number()})*safety"
        if i % 2
        else f"{number()}*task + fade({number()}..{number()}, 8)*safety"
        for i in range(n)
    ]


def by_prompt(n: int) -> list[str]:
    """`n` recipes with a gate."""
    return [f"gate({number()}*task + 0.8*safety, by=risk, safety in 0..1)" for _ in range(n)]


def long_prompt() -> str:
    """About 1,000 tokens that no other prompt begins with."""
    return f"{time.time_ns()} " + " ".join(_draw.choices(WORDS, k=LONG))


def ask(server: RunningServer, model: str, prompt: str, tokens: int = 1) -> float:
    """Seconds to an answer of `tokens` tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    began = time.perf_counter()
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=1200).raise_for_status()
    return time.perf_counter() - began


def ask_cached(server: RunningServer, model: str, first: str) -> float:
    """Seconds to the first token of `model` on a long prompt that `first` has been asked with."""
    prompt = long_prompt()
    ask(server, first, prompt)
    return ask(server, model, prompt)


def sweep(server: RunningServer, recipe: str) -> float:
    """Seconds for all points of a sweep over new long prompts, all requests at once."""
    work = [
        (recipe.format(f"{i / (POINTS - 1):g}"), prompt)
        for prompt in [long_prompt() for _ in range(PROMPTS)]
        for i in range(POINTS)
    ]
    with ThreadPoolExecutor(len(work)) as pool:
        began = time.perf_counter()
        list(pool.map(lambda one: ask(server, one[0], one[1], TOKENS), work))
        return time.perf_counter() - began


def compare_throughput(
    server: RunningServer, what: str, recipes: Callable[[int], list[str]], aim: float, load: tuple[int, int], pairs: int
) -> None:
    """New recipes of one kind against new plain mixes, many at once: `load` is (requests, tokens)."""
    n, tokens = load
    print(f"  {n} requests with {what}", flush=True)
    row = partial(Comparison, f"{n} requests with {n} different {what}", what, "plain mixes", "tok/s", (">=", aim))
    compare(row, lambda: throughput(server, recipes(n), tokens), lambda: throughput(server, mixes(n), tokens), pairs)


def measure_first(server: RunningServer, pairs: int) -> None:
    """The first token of new functions against that of a plain mix asked before."""
    row = partial(
        Comparison,
        "first token of a function never seen",
        "new functions",
        "a plain mix asked before",
        "s",
        ("<=", 1.05),
    )
    warm = ["0.6*task + 0.4*safety"]
    compare(
        row,
        lambda: median(first_token(server, [one]) for one in by_module(8) + by_position(7)),
        lambda: median(first_token(server, warm) for _ in range(15)),
        pairs,
    )


def measure_build(server: RunningServer, scratch: Path, pairs: int) -> None:
    """The first token of new functions of the module against those of a server that builds them."""
    row = partial(
        Comparison, "first token of weights by module, against a build of them", "mixed", "built", "s", ("<=", 0.2)
    )
    (scratch / "builder").mkdir()
    with ours(ENGINE, scratch / "builder", FUSION_MIXED="off", FUSION_MAX_CPU_LORAS="16") as builder:
        compare(row, lambda: first_token(server, by_module(1)), lambda: first_token(builder, by_module(1)), pairs)


def measure_prompts(server: RunningServer, wanted: set[str], pairs: int) -> None:
    """What a prompt that is the base's own saves, and what a gate costs."""
    if "sweep" in wanted:
        print(f"  {POINTS} points on {PROMPTS} long prompts", flush=True)
        name = f"{POINTS}-point sweep on prompts of 1,000 tokens, on the answer alone"
        row = partial(Comparison, name, "answer(…)", "the same without answer(…)", "s", ("<=", 1 / 3))
        compare(
            row,
            partial(sweep, server, "answer(1*task + {}*safety)"),
            partial(sweep, server, "1*task + {}*safety"),
            pairs,
        )
    if "cached" in wanted:
        print("  a cached prompt", flush=True)
        row = partial(
            Comparison,
            "first token of an answer-only mix never seen on a cached prompt of 1,000 tokens",
            "cached",
            "not cached",
            "s",
            ("<=", 0.2),
        )

        def unseen() -> str:
            return f"answer({number()}*task + {number()}*safety)"

        compare(
            row,
            lambda: median(ask_cached(server, unseen(), BASE_NAME) for _ in range(3)),
            lambda: median(ask(server, unseen(), long_prompt()) for _ in range(3)),
            pairs,
        )
    if "gate" in wanted:
        print("  a gate before the first token", flush=True)
        row = partial(
            Comparison,
            "first token with a gate, prompt of 1,000 tokens shared",
            "with a gate",
            "without",
            "s",
            ("<=", 1.05),
        )
        gated = "gate(answer(1*task + 0.8*safety), by=risk, safety in 0..0.8)"
        plain = "answer(1*task + 0.8*safety)"
        compare(
            row,
            lambda: median(ask(server, gated, long_prompt()) for _ in range(3)),
            lambda: median(ask(server, plain, long_prompt()) for _ in range(3)),
            pairs,
        )


def measure(wanted: set[str], gate: Path, scratch: Path, pairs: int) -> None:
    """All rows that are `wanted`."""
    settings = {"FUSION_ADAPTER_ROOTS": f"{scratch}:{gate.parent}"}
    if gate.is_dir():
        settings["FUSION_ADAPTERS"] = f"task=shipped:task,safety=shipped:safety,risk={gate}"
    with ours(ENGINE, scratch, **settings) as server:
        kinds: Sequence[tuple[str, str, Callable[[int], list[str]], float]] = (
            ("tables", "module tables", by_module, 0.95),
            ("positions", "position schedules", by_position, 0.95),
            ("gates", "gated recipes", by_prompt, 0.93),
        )
        for name, what, recipes, aim in kinds:
            for load in LOADS if name in wanted else ():
                compare_throughput(server, what, recipes, aim, load, pairs)
        if "base" in wanted:
            print("  mixes against the base", flush=True)
            row = partial(
                Comparison, "16 plain mixes against the base, same server", "mixes", "base", "tok/s", (">=", 0.95)
            )
            models = [BASE_NAME] * 16
            compare(row, lambda: throughput(server, mixes(16), 64), lambda: throughput(server, models, 64), pairs)
        if "first" in wanted:
            print("  first token", flush=True)
            measure_first(server, pairs)
        if "build" in wanted:
            print("  first token against a build", flush=True)
            measure_build(server, scratch, pairs)
        measure_prompts(server, wanted, pairs)


def main() -> int:
    """Command line; exit 0 measured."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rows", default=",".join(ROWS), help="which figures; default: %(default)s")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="default: %(default)s")
    parser.add_argument("--gate", type=Path, default=GATE, help="folder of the gate; default: the one that ships")
    args = parser.parse_args()
    wanted = set(args.rows.split(","))
    if wanted - set(ROWS):
        parser.error(f"unknown rows {', '.join(wanted - set(ROWS))}; expected {', '.join(ROWS)}")
    if wanted & {"gates", "gate"} and not args.gate.is_dir():
        parser.error(f"{args.gate} is no folder: name a gate with --gate, or leave 'gates' and 'gate' out of --rows")
    scratch = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        measure(wanted, args.gate.resolve(), scratch, args.pairs)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
