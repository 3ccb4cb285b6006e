"""The headline points of the paper's experiment once more: at three training seeds, and on MMLU.

    python -m benchmarks.headline --data DIR [--rows seeds mmlu]

The points are the best of examples/report (`make paper-full`), the paper's 0.6 + 0.4 and the task adapter alone; the
sets, the halves and the length of answers are that experiment's. A seed is that of the training's data order and of the
adapter's first weights; seed 0 is the shipped adapters'. Adapters that are missing are trained first and kept in
--cache. What was stopped goes on.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from inspect_ai import Task

from benchmarks.common import RESULTS, ROOT, machine, ours, shown
from benchmarks.paper import (
    ALL_ROWS,
    ALL_ROWS_CHANGES,
    ENGINE,
    IN_FLIGHT,
    SAFETY_DATA,
    identity,
    job_file,
    serving,
    sets,
    train,
)
from eval_clients.endpoint import Endpoint
from eval_clients.results import Line, table
from eval_clients.running import FolderError, Running, ready
from eval_clients.sweeps.points import Point
from eval_clients.sweeps.sweep import sweep
from eval_clients.tasks import benchmarks as tasks
from eval_clients.tasks import data
from eval_clients.tasks.data import Half

PAPER = "0.6*task + 0.4*safety"
SEEDS = (0, 1, 2)
NAME = re.compile(rf"\b(task|{ALL_ROWS}|safety)(?![\w-])")
MEASURES = ("harm", "safe_answered", "over_refusal", "degenerate", "task")
QUESTIONS = 200


def names(recipe: str) -> list[str]:
    """The adapters in a recipe, each once."""
    return list(dict.fromkeys(NAME.findall(recipe)))


def of_seed(recipe: str, seed: int) -> str:
    """The recipe with the adapters of that training seed; 0 is the shipped ones'."""
    return NAME.sub(rf"\1-seed{seed}", recipe) if seed else recipe


def trained(cache: Path, recipes: Sequence[str], seeds: Sequence[int]) -> dict[str, Path]:
    """Every adapter of the recipes by name, trained when it is not there."""
    found = {name: ROOT / "examples/adapters" / name for name in ("task", "safety")}
    for seed in seeds:
        for name in (name for recipe in recipes for name in names(recipe)):
            seeded = of_seed(name, seed)
            if seeded not in found:
                changes = [f"train.seed={seed}", f"data.seed={seed}"] if seed else []
                changes += ALL_ROWS_CHANGES if name == ALL_ROWS else ()
                train("task" if name == "task" else "safety", cache / seeded, *changes)
                found[seeded] = cache / seeded
    return found


def record(part: str, rows: list[dict[str, Any]]) -> None:
    """Into results/headline.json, dated; the other part stays."""
    path = RESULTS / "headline.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    made = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "command": f"python -m benchmarks.headline --rows {part}"}
    path.write_text(json.dumps({**kept, part: {**made, "machine": machine(), "rows": rows}}, indent=1) + "\n")


def rendered(content: dict[str, Any]) -> str:
    """The record as markdown tables."""
    columns = {"seeds": ("recipe", "seed", *MEASURES), "mmlu": ("model", "mmlu")}
    out = []
    for part, made in content.items():
        out += [f"| {' | '.join(columns[part])} |", "| --- " * len(columns[part]) + "|"]
        for row in made["rows"]:
            out.append(f"| {' | '.join(shown(row[name]) for name in columns[part])} |")
        out += ["", f"`{made['command']}`, {made['date']}, {made['machine']}", ""]
    return "\n".join(out)


def main() -> int:
    """Command line; exit 0 measured, 1 an answer is missing, 2 no data or answers of other adapters in --cache."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.headline", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True, help="folder with xstest/ and mmlu/, which you bring")
    parser.add_argument("--rows", nargs="+", choices=("seeds", "mmlu"), default=["seeds", "mmlu"])
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/paper", help="logs and trained adapters")
    args = parser.parse_args()
    best: str = json.loads((ROOT / "examples/report/report.json").read_text())["verdict"]["best"]
    recipes = list(dict.fromkeys([best, PAPER, "1*task"]))
    seeds = SEEDS if "seeds" in args.rows else SEEDS[:1]
    try:
        prompts = args.data / "xstest/xstest_prompts.csv"
        data.text_of(prompts)
        known = trained(args.cache, recipes, seeds)
        if "seeds" in args.rows:
            ready(args.cache / "headline-seeds", resume=True, settings=identity(known, prompts, SAFETY_DATA))
        if "mmlu" in args.rows:
            of_mmlu = trained(args.cache, recipes, SEEDS[:1])
            ready(args.cache / "headline-mmlu", resume=True, settings=identity(of_mmlu, args.data / "mmlu"))
    except (data.DataError, FolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stacks = {"+".join(sorted(of_seed(n, seed) for n in names(recipe))) for recipe in recipes for seed in seeds}
    settings = serving(known, args.cache, sorted(stack for stack in stacks if "+" in stack))
    missing = 0
    with tempfile.TemporaryDirectory() as scratch, ours(ENGINE, Path(scratch), **settings) as server:
        endpoint = Endpoint(f"{server.url}/v1")

        def lines(
            row: str, models: Sequence[str], every: Callable[[], list[Task]], half: Half | None
        ) -> dict[str, Line]:
            """By model, in that order; what was answered in an earlier run is not asked again."""
            nonlocal missing
            points = [Point(model, "control", row) for model in models]
            how = Running(display="plain", in_flight=IN_FLIGHT)
            found = sweep(endpoint, points, every, args.cache / f"headline-{row}", how)
            print(table(found.lines(half)))
            missing += len(found.answers.missing)
            return found.lines(half)

        if "seeds" in args.rows:
            job = job_file(args.cache, 100)
            rows = []
            for seed in seeds:  # each has a stack of its own, and one stack at a time runs fastest
                models = [of_seed(recipe, seed) for recipe in recipes]
                measured = lines("seeds", models, lambda: sets(args.data, job, full=True), "report")
                rows += [
                    {"recipe": recipe, "seed": seed, **measured[model].to_json()}
                    for recipe, model in zip(recipes, models, strict=True)
                    if model in measured
                ]
            if not missing:
                record("seeds", sorted(rows, key=lambda row: recipes.index(row["recipe"])))
        if "mmlu" in args.rows:
            models = list(dict.fromkeys([endpoint.base(), "1*task", "1*safety", best]))
            measured = lines("mmlu", models, lambda: [tasks.mmlu(str(args.data / "mmlu"), limit=QUESTIONS)], None)
            if not missing:
                record("mmlu", [one.to_json() for one in measured.values()])
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
