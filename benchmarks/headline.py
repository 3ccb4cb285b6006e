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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inspect_ai import Task

from benchmarks.common import RESULTS, ROOT, format_cell, machine, stamp
from benchmarks.paper import (
    ALL_ROWS,
    ALL_ROWS_CHANGES,
    ENGINE,
    IN_FLIGHT,
    SAFETY_DATA,
    build_tasks,
    identify,
    serve_settings,
    train,
    write_orders,
)
from benchmarks.servers import ours
from eval_clients.answers import Gap
from eval_clients.endpoint import Endpoint
from eval_clients.errors import EvaluationError
from eval_clients.results import ModelScores, format_table
from eval_clients.running import RunOptions, prepare_folder
from eval_clients.sweeps.points import Point
from eval_clients.sweeps.sweep import measure_points
from eval_clients.tasks import benchmarks as tasks
from eval_clients.tasks.data import Half
from eval_clients.tasks.text import read_text

PAPER = "0.6*task + 0.4*safety"
SEEDS = (0, 1, 2)
NAME = re.compile(rf"\b(task|{ALL_ROWS}|safety)(?![\w-])")
MEASURES = ("harm", "safe_answered", "over_refusal", "degenerate", "task")
QUESTIONS = 200


def list_adapters(recipe: str) -> list[str]:
    """The adapters in a recipe, each once."""
    return list(dict.fromkeys(NAME.findall(recipe)))


def replace_seed(recipe: str, seed: int) -> str:
    """The recipe with the adapters of that training seed; 0 is the shipped ones'."""
    return NAME.sub(rf"\1-seed{seed}", recipe) if seed else recipe


def train_missing(cache: Path, recipes: Sequence[str], seeds: Sequence[int]) -> dict[str, Path]:
    """Every adapter of the recipes by name, trained when it does not exist."""
    adapters = {name: ROOT / "examples/adapters" / name for name in ("task", "safety")}
    for seed in seeds:
        for name in (name for recipe in recipes for name in list_adapters(recipe)):
            seeded = replace_seed(name, seed)
            if seeded not in adapters:
                changes = [f"train.seed={seed}", f"data.seed={seed}"] if seed else []
                changes += ALL_ROWS_CHANGES if name == ALL_ROWS else ()
                train("task" if name == "task" else "safety", cache / seeded, *changes)
                adapters[seeded] = cache / seeded
    return adapters


def record(part: str, rows: list[dict[str, Any]]) -> None:
    """Write results/headline.json, dated; the other part stays."""
    path = RESULTS / "headline.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    content[part] = {**stamp(f"python -m benchmarks.headline --rows {part}"), "machine": machine(), "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")


def render(content: Mapping[str, Any]) -> str:
    """The record as markdown tables."""
    columns = {"seeds": ("recipe", "seed", *MEASURES), "mmlu": ("model", "mmlu")}
    lines = []
    for part, entry in content.items():
        lines += [f"| {' | '.join(columns[part])} |", "| --- " * len(columns[part]) + "|"]
        for row in entry["rows"]:
            lines.append(f"| {' | '.join(format_cell(row[name]) for name in columns[part])} |")
        lines += ["", f"`{entry['command']}`, {entry['date']}, {entry['machine']}", ""]
    return "\n".join(lines)


@dataclass
class Headline:
    """Measures the headline points on one server, and counts what is missing."""

    endpoint: Endpoint
    data: Path
    cache: Path
    recipes: Sequence[str]
    missing: list[Gap] = field(default_factory=list)

    def measure_seeds(self, seeds: Sequence[int]) -> None:
        """Measure the recipes with the adapters of each training seed, on the half that no weight was chosen on."""
        job = write_orders(self.cache, 100)
        rows = []
        for seed in seeds:  # each has a stack of its own, and one stack at a time runs fastest
            models = [replace_seed(recipe, seed) for recipe in self.recipes]
            scores = self._measure("seeds", models, lambda: build_tasks(self.data, job, full=True), "report")
            rows += [
                {"recipe": recipe, "seed": seed, **scores[model].to_json()}
                for recipe, model in zip(self.recipes, models, strict=True)
                if model in scores
            ]
        if not self.missing:
            record("seeds", sorted(rows, key=lambda row: self.recipes.index(row["recipe"])))

    def measure_mmlu(self) -> None:
        """Measure the base, both adapters and the best point on MMLU."""
        models = list(dict.fromkeys([self.endpoint.base(), "1*task", "1*safety", self.recipes[0]]))
        path = str(self.data / "mmlu")
        scores = self._measure("mmlu", models, lambda: [tasks.mmlu(path, limit=QUESTIONS)], None)
        if not self.missing:
            record("mmlu", [one.to_json() for one in scores.values()])

    def _measure(
        self, row: str, models: Sequence[str], build: Callable[[], list[Task]], half: Half | None
    ) -> dict[str, ModelScores]:
        """By model, in that order; what was answered in an earlier run is not asked again."""
        points = [Point(model, "control", row) for model in models]
        options = RunOptions(display="plain", in_flight=IN_FLIGHT)
        sweep = measure_points(self.endpoint, points, build, self.cache / f"headline-{row}", options)
        print(format_table(sweep.scores(half)))
        self.missing += sweep.answers.missing
        return sweep.scores(half)


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
        read_text(prompts)
        adapters = train_missing(args.cache, recipes, seeds)
        if "seeds" in args.rows:
            prepare_folder(args.cache / "headline-seeds", True, identify(adapters, prompts, SAFETY_DATA))
        if "mmlu" in args.rows:
            shipped = train_missing(args.cache, recipes, SEEDS[:1])
            prepare_folder(args.cache / "headline-mmlu", True, identify(shipped, args.data / "mmlu"))
        groups = {"+".join(sorted(replace_seed(n, seed) for n in list_adapters(r))) for r in recipes for seed in seeds}
        settings = serve_settings(adapters, args.cache, sorted(group for group in groups if "+" in group))
        with tempfile.TemporaryDirectory() as scratch, ours(ENGINE, Path(scratch), **settings) as server:
            headline = Headline(Endpoint(f"{server.url}/v1"), args.data, args.cache, recipes)
            if "seeds" in args.rows:
                headline.measure_seeds(seeds)
            if "mmlu" in args.rows:
                headline.measure_mmlu()
    except EvaluationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if headline.missing else 0


if __name__ == "__main__":
    sys.exit(main())
