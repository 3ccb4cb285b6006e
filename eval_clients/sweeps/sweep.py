"""Measure many points side by side on one live server.

All mixed points run in one wave, all their requests in flight together, since their weights are request data. Points
that must be built run one after the other, each in a wave of its own. A sweep that was stopped continues where it was.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from inspect_ai import Task

from eval_clients.answers import Answers, read_answers
from eval_clients.endpoint import Endpoint, Plan
from eval_clients.results import ModelScores, score_models
from eval_clients.running import RunOptions, check_fusions, run_tasks
from eval_clients.sweeps.points import Point
from eval_clients.tasks.data import Half


@dataclass(frozen=True, slots=True)
class Sweep:
    """What was measured: points with their plans (of a fusion service), all answers, and remarks for the report."""

    points: Sequence[Point]
    plans: Mapping[str, Plan]
    answers: Answers
    notes: Sequence[str] = ()

    def scores(self, half: Half | None = None) -> dict[str, ModelScores]:
        """The scores of each point that has any answer, on one half of every set or on all of it."""
        scores = score_models(self.answers.items, half)
        return {point.model: scores[point.model] for point in self.points if point.model in scores}

    def candidates(self, half: Half | None = None) -> dict[str, ModelScores]:
        """The scores of the points with all their answers, if there are any: only these are compared with one
        another, since a point whose harmful prompts failed would look harmless.
        """
        scores, incomplete = self.scores(half), {gap.model for gap in self.answers.missing}
        return {model: one for model, one in scores.items() if model not in incomplete} or scores


def measure_points(
    endpoint: Endpoint,
    points: Sequence[Point],
    build_tasks: Callable[[], Sequence[Task]],
    folder: Path,
    options: RunOptions,
    *,
    plans: Mapping[str, Plan] | None = None,
    notes: Sequence[str] = (),
) -> Sweep:
    """Measure every point whose answers in `folder` are incomplete, and read all results; what failed is listed in
    the answers' `missing`. `build_tasks` is called once for each wave; `plans` are those of an earlier round.
    """
    points = drop_repeats(points)
    plans = request_plans(endpoint, points, plans or {})
    check_fusions(folder, {model: plan.digest for model, plan in plans.items()})
    save_points(folder, points)
    expected = options.seeds * sum(len(task.dataset) for task in build_tasks())
    waves = split_waves(find_unfinished(points, read_answers(folder), expected), plans)
    for number, wave in enumerate(waves, 1):
        what = f"{len(wave)} points in one batch" if len(wave) > 1 else wave[0].model
        print(f"wave {number} of {len(waves)}: {what}", file=sys.stderr, flush=True)
        run_tasks(build_tasks(), endpoint, [point.model for point in wave], folder, options)
    return Sweep(points, plans, read_answers(folder), notes)


def drop_repeats(points: Iterable[Point]) -> list[Point]:
    """Each model once, at its first point."""
    first: dict[str, Point] = {}
    for point in points:
        first.setdefault(point.model, point)
    return list(first.values())


def request_plans(endpoint: Endpoint, points: Sequence[Point], known: Mapping[str, Plan]) -> dict[str, Plan]:
    """Plans of all points but the base, `known` ones reused; empty unless the endpoint is a fusion service."""
    if not endpoint.is_fusion_service():
        return {}
    base = endpoint.base()
    models = [point.model for point in points if point.model != base]
    return {model: known.get(model) or endpoint.plan(model) for model in models}


def split_waves(points: Sequence[Point], plans: Mapping[str, Plan]) -> list[list[Point]]:
    """Mixed points together, built ones one by one."""
    built = [point for point in points if point.model in plans and not plans[point.model].mixed]
    together = [point for point in points if point not in built]
    return ([together] if together else []) + [[point] for point in built]


def find_unfinished(points: Sequence[Point], answers: Answers, expected: int) -> list[Point]:
    """The points with fewer than `expected` answers."""
    counts = Counter(answer.model for answer in answers.items)
    return [point for point in points if counts[point.model] < expected]


def save_points(folder: Path, points: Sequence[Point]) -> None:
    """Write `points.json`, what the report is about; points of earlier rounds stay."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "points.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    rows = {row["model"]: row for row in (*earlier, *map(asdict, points))}
    path.write_text(json.dumps([*rows.values()], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def publish_scorecards(endpoint: Endpoint, sweep: Sweep, provenance: Mapping[str, object]) -> int:
    """Attach the scores of each point with all its answers to its fusion digest; returns how many were attached.

    `provenance` says when, by which command and on which sets, with their digests. `half_report` of a card is what was
    measured on the half that no weight was chosen on. The same is attached once a day.
    """
    count, incomplete = 0, {gap.model for gap in sweep.answers.missing}
    reported = sweep.scores("report")
    for model, scores in sweep.scores().items():
        plan = sweep.plans.get(model)
        if plan is not None and model not in incomplete:
            half = {"half_report": reported[model].to_json()} if model in reported else {}
            count += endpoint.publish(plan, provenance, scores.to_json() | half)
    return count
