"""This checkout against an earlier commit of it: `python -m benchmarks.before COMMIT [--rows base,mixed,fuse,start]`.

Both services run at once in the same environment, each from its own tree, and are asked in turn. A ratio of 1 is no
change; the aims allow for what the machine's noise leaves undecided.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from benchmarks.common import BASE_NAME, PAIRS, ROOT, Comparison, alternate, record
from benchmarks.servers import RunningServer, ours
from benchmarks.serving import ENGINE, mixed_throughput
from benchmarks.traffic import base_first_token, throughput

Aim = tuple[Literal["<=", ">="], float]
Side = TypeVar("Side")
COMMAND = "python -m benchmarks.before"
ROWS = ("base", "mixed", "fuse", "start")
FUSE = """
import sys, tempfile, time
from pathlib import Path
from statistics import median
from adapters import fuse, load, parse, save

def run(out):
    began = time.perf_counter()
    folder = Path("examples/adapters")
    built, _ = fuse(parse("0.6*task + 0.4*safety"), {name: load(folder / name) for name in ("task", "safety")})
    save(built, out)
    return time.perf_counter() - began

with tempfile.TemporaryDirectory() as place:
    times = [run(Path(place, str(i))) for i in range(31)]
print(median(times[1:]))
"""
"""Seconds from the shipped adapters' files to the landed sum, the median of 30 in one process."""


@contextmanager
def check_out(commit: str, place: Path) -> Iterator[Path]:
    """A work tree of `commit` in `place`, removed at the end."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", "-f", str(place), commit], check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run([*git, "remove", "--force", str(place)], check=True)


def time_fuse(tree: Path) -> float:
    """Seconds that one sum takes with the code of `tree`."""
    return float(subprocess.run([sys.executable, "-c", FUSE], cwd=tree, check=True, capture_output=True).stdout)


def time_start(tree: Path, scratch: Path) -> float:
    """Seconds from the command to ready with the code of `tree`."""
    with ours(ENGINE, scratch, tree) as server:
        return server.started_s


def compare(
    commit: str, pairs: int, name: str, unit: str, aim: Aim, measure: Callable[[Side], float], mine: Side, other: Side
) -> None:
    """Measure both sides in turn and record the row."""
    print(f"  {name}", flush=True)
    values = alternate(partial(measure, mine), partial(measure, other), pairs)
    row = Comparison(f"{name}, against {commit}", "this commit", commit, unit, aim, **values)
    record("before.json", f"{COMMAND} {commit}", [row])


def compare_servers(row: Callable[..., None], rows: set[str], mine: RunningServer, other: RunningServer) -> None:
    """Rows `base` and `mixed`: throughput and first token of 1 and 16 streams."""
    for n in (1, 16):
        streams = f"{n} stream{'s' * (n > 1)}"
        if "base" in rows:
            answer = partial(throughput, models=[BASE_NAME] * n, tokens=64)
            row(f"base model throughput, {streams}", "tok/s", (">=", 0.98), answer, mine, other)
            first = partial(base_first_token, n=n)
            row(f"base model first token, {streams}", "s", ("<=", 1.02), first, mine, other)
        if "mixed" in rows:
            mix = partial(mixed_throughput, n=n, tokens=32)
            row(f"mixes in one slot, {streams}", "tok/s", (">=", 0.98), mix, mine, other)


def main() -> int:
    """Command line; exit 0 measured."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("commit", help="the commit to compare with")
    parser.add_argument("--rows", default=",".join(ROWS), help="which figures; default: %(default)s")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="default: %(default)s")
    args = parser.parse_args()
    rows = set(args.rows.split(","))
    if unknown := rows - set(ROWS):
        parser.error(f"unknown rows {', '.join(sorted(unknown))}; expected {', '.join(ROWS)}")
    shorten = ["git", "-C", str(ROOT), "rev-parse", "--short", args.commit]
    commit = subprocess.run(shorten, check=True, capture_output=True, text=True).stdout.strip()
    row = partial(compare, commit, args.pairs)
    with tempfile.TemporaryDirectory(prefix="bench-") as place, check_out(commit, Path(place, "tree")) as tree:
        scratch = {side: Path(place, name) for side, name in ((ROOT, "mine"), (tree, "other"))}
        for folder in scratch.values():
            folder.mkdir()
        if "fuse" in rows:
            row("fusing the shipped adapters, files to folder", "s", ("<=", 1.05), time_fuse, ROOT, tree)
        if "start" in rows:
            row("start, installed", "s", ("<=", 1.05), lambda side: time_start(side, scratch[side]), ROOT, tree)
        if rows & {"base", "mixed"}:
            with ours(ENGINE, scratch[ROOT]) as mine, ours(ENGINE, scratch[tree], tree) as other:
                compare_servers(row, rows, mine, other)
    return 0


if __name__ == "__main__":
    sys.exit(main())
