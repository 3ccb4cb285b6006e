"""Weights that are functions against plain ones: `python -m benchmarks.functions [--rows tables,…] [--gate FOLDER]`.

One server with one slot answers both sides in turn. Only the row `build` has a second server, which builds what the
first mixes. No prompt is used twice, except where a row is about that.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import httpx

from benchmarks.common import BASE_NAME, PAIRS, ROOT, Comparison, alternate, record
from benchmarks.servers import RunningServer, ours
from benchmarks.serving import ENGINE, LOADS, mixed_throughput, mixes
from benchmarks.traffic import first_token, prompt, throughput

COMMAND = "python -m benchmarks.functions"
ROWS = ("tables", "positions", "gates", "base", "unseen", "build", "sweep", "cached", "gated")
GATE = ROOT / "examples/adapters/risk"
GATED = "gate({}, by=risk, safety in 0..0.8)"
"""Around a recipe."""
MIX, ANSWER = "1*task + 0.8*safety", "answer(1*task + 0.8*safety)"
WARM = "0.6*task + 0.4*safety"
"""The shipped profile, whose stack is made at startup."""
LONG = 430
"""Words of a prompt of about 1,000 tokens."""
POINTS = [i / 20 for i in range(21)]
Draw = Callable[[int], list[str]]
Aim = tuple[Literal["<=", ">="], float]
_draw = random.Random(1)


def draw_weight(draw: random.Random = _draw) -> str:
    """A number as a weight."""
    return f"{draw.uniform(0.1, 1):.6f}"


def draw_ramp(draw: random.Random = _draw) -> str:
    """A weight by layer."""
    return f"ramp({draw_weight(draw)}..{draw_weight(draw)})"


def draw_tables(n: int) -> list[str]:
    """`n` recipes in which every module has a weight of its own, never used before."""
    task = "{{*.q_proj: {}, *.v_proj: {}, *: {}}}*task"
    safety = "{{*.mlp.*: {}, *.q_proj: {}, *: {}}}*safety"
    return [f"{task} + {safety}".format(*(draw_ramp() for _ in range(6))) for _ in range(n)]


def draw_positions(n: int) -> list[str]:
    """`n` recipes whose weights change with position, three or eight phases in turn, never used before."""
    kinds = ("{}*task + steps(prompt: {}, 0: {}, 4: {})*safety", "{}*task + fade({}..{}, 8)*safety")
    return [kinds[i % 2].format(*(draw_weight() for _ in range(4))) for i in range(n)]


def draw_answer() -> str:
    """A mix that acts on the answer alone, never used before."""
    return f"answer({mixes(1)[0]})"


def draw_schedule(draw: random.Random) -> str:
    """A recipe with a weight by layer."""
    return f"{draw_weight(draw)}*task + {draw_ramp(draw)}*safety"


def repeat(recipe: str, n: int) -> list[str]:
    """`recipe` n times."""
    return [recipe] * n


def warm_first_token(server: RunningServer, draw: Draw) -> float:
    """Seconds to the first token of a recipe, the median of 15 with adapters resident: one alone scatters."""
    return median(first_token(server, draw(1), source="warm") for _ in range(15))


def long_first_token(server: RunningServer, model: str) -> float:
    """Seconds to the first token after a new prompt of 1,000 tokens."""
    return first_token(server, [model], prompts=[prompt(LONG)])


def cached_first_token(server: RunningServer, model: str) -> float:
    """The same after a prompt that the base was asked before."""
    text = prompt(LONG)
    first_token(server, [BASE_NAME], prompts=[text])
    return first_token(server, [model], prompts=[text])


def sweep(server: RunningServer, recipe: str, prompts: int) -> float:
    """Output tokens per second of a sweep: `recipe` at all points over so many new prompts of 1,000 tokens."""
    texts = [prompt(LONG) for _ in range(prompts)]
    models = [recipe.format(weight) for weight in POINTS for _ in texts]
    return throughput(server, models, 8, prompts=texts * len(POINTS))


def compare(
    pairs: int,
    name: str,
    sides: tuple[str, str],
    aim: Aim,
    mine: Callable[[], float],
    peer: Callable[[], float],
) -> None:
    """Measure both sides in turn and record the row: seconds where less is better, else tokens per second."""
    print(f"  {name}", flush=True)
    unit = "s" if aim[0] == "<=" else "tok/s"
    record("functions.json", COMMAND, [Comparison(name, *sides, unit, aim, **alternate(mine, peer, pairs))])


def compare_many(server: RunningServer, pairs: int, what: str, aim: float, draw: Draw) -> None:
    """Throughput of many requests at once with what `draw` gives, against as many plain mixes."""
    for n, tokens in LOADS:
        name, sides = f"{n} requests with {what}, in one slot", (what, f"{n} plain mixes")
        mine = partial(draw_throughput, server, draw, n, tokens)
        compare(pairs, name, sides, (">=", aim), mine, partial(mixed_throughput, server, n, tokens))


def draw_throughput(server: RunningServer, draw: Draw, n: int, tokens: int) -> float:
    """Output tokens per second of `n` recipes at once, drawn anew."""
    return throughput(server, draw(n), tokens)


def many_at_once(server: RunningServer, wanted: set[str], pairs: int) -> None:
    """Rows `tables`, `positions`, `gates` and `base`."""
    if "tables" in wanted:
        compare_many(server, pairs, "different weights by module", 0.95, draw_tables)
    if "positions" in wanted:
        compare_many(server, pairs, "different weights by position", 0.95, draw_positions)
    for recipe, where in ((MIX, ""), (ANSWER, " on the answer alone")) if "gates" in wanted else ():
        draw = partial(repeat, GATED.format(recipe))
        compare_many(server, pairs, f"weights{where} that a gate chooses", 0.93, draw)
    if "base" in wanted:
        compare(
            pairs,
            "16 plain mixes against the base",
            ("plain mixes", "the base"),
            (">=", 0.95),
            partial(mixed_throughput, server, 16, 64),
            partial(throughput, server, [BASE_NAME] * 16, 64),
        )


def first_tokens(server: RunningServer, wanted: set[str], pairs: int) -> None:
    """Rows `unseen`, `cached` and `gated`: each value is a median of several, since one alone scatters."""
    for what, draw in (("module", draw_tables), ("position", draw_positions)) if "unseen" in wanted else ():
        compare(
            pairs,
            f"first token with new weights by {what}",
            (f"new weights by {what}", "a plain mix requested before"),
            ("<=", 1.05),
            partial(warm_first_token, server, draw),
            partial(warm_first_token, server, partial(repeat, WARM)),
        )
    if "cached" in wanted:
        compare(
            pairs,
            "first token of a new mix on the answer alone, prompt of 1,000 tokens",
            ("prompt cached by the base", "prompt not cached"),
            ("<=", 0.2),
            lambda: median(cached_first_token(server, draw_answer()) for _ in range(3)),
            lambda: median(long_first_token(server, draw_answer()) for _ in range(3)),
        )
    if "gated" in wanted:
        compare(
            pairs,
            "first token of a mix on the answer alone, new prompt of 1,000 tokens",
            ("weights that a gate chooses", "weights as stated"),
            ("<=", 1.05),
            lambda: median(long_first_token(server, GATED.format(ANSWER)) for _ in range(3)),
            lambda: median(long_first_token(server, ANSWER) for _ in range(3)),
        )


def builds(server: RunningServer, scratch: Path, pairs: int) -> None:
    """Row `build`: the same recipes on this server and on one that has to build them."""
    mine, peer = random.Random(2), random.Random(2)
    scratch.mkdir()
    with ours(ENGINE, scratch, FUSION_MIXED="off") as builder:
        compare(
            pairs,
            "first token with a new weight by layer",
            ("mixed", "built"),
            ("<=", 0.2),
            lambda: median(first_token(server, [draw_schedule(mine)], source="warm") for _ in range(5)),
            lambda: median(first_token(builder, [draw_schedule(peer)], source="built") for _ in range(5)),
        )


def measure(server: RunningServer, scratch: Path, wanted: set[str], args: argparse.Namespace) -> None:
    """All rows, on a running server."""
    if wanted & {"gates", "gated"}:
        body = {"name": "risk", "path": str(args.gate.resolve()), "replace": True}
        httpx.post(f"{server.url}/v1/adapters", json=body, timeout=300).raise_for_status()
    many_at_once(server, wanted, args.pairs)
    first_tokens(server, wanted, args.pairs)
    if "build" in wanted:
        builds(server, scratch / "builder", args.pairs)
    if "sweep" in wanted:
        compare(
            args.pairs,
            f"sweep of {len(POINTS)} weights over {args.prompts} prompts of 1,000 tokens",
            ("mixes on the answer alone", "plain mixes"),
            (">=", 3.0),
            partial(sweep, server, "answer(1*task + {}*safety)", args.prompts),
            partial(sweep, server, "1*task + {}*safety", args.prompts),
        )


def main() -> int:
    """Command line; exit 0 measured."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rows", default=",".join(ROWS), help="which figures; default: %(default)s")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="default: %(default)s")
    parser.add_argument("--prompts", type=int, default=2, help="of the sweep; default: %(default)s")
    parser.add_argument("--gate", type=Path, default=GATE, help="folder of the gate; default: %(default)s")
    args = parser.parse_args()
    wanted = set(args.rows.split(","))
    if wanted - set(ROWS):
        parser.error(f"unknown rows {', '.join(wanted - set(ROWS))}; expected {', '.join(ROWS)}")
    if wanted & {"gates", "gated"} and not args.gate.is_dir():
        parser.error(f"--gate {args.gate} is not a folder: name a gate's, or leave gates and gated out of --rows")
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        settings = {"FUSION_MAX_LORAS": "1", "FUSION_ADAPTER_ROOTS": f"{place}:{args.gate.resolve().parent}"}
        with ours(ENGINE, Path(place), **settings) as server:
            measure(server, Path(place), wanted, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
