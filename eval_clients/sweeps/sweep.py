"""A sweep: every point of a grid of recipes measured side by side on one live server, with controls.

All mixed points run in one wave, all their requests in flight together, since their weights are request data. Points
that must be built run one after the other, each in a batch of its own. A sweep goes on where it was stopped.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from inspect_ai import Task

from eval_clients.endpoint import Endpoint, EndpointError, Plan, publish
from eval_clients.results import Answers, Line, lines, read
from eval_clients.running import Running, run, same_fusions
from eval_clients.sweeps.controls import random_adapter, replaced, uses, without
from eval_clients.sweeps.points import Point
from eval_clients.tasks.data import Half

CONTROLS = 3
"""Points of the grid at which the controls are measured, spread over it."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What was measured: points with their plans (of a fusion service), all answers, what was left out."""

    points: Sequence[Point]
    plans: Mapping[str, Plan]
    answers: Answers
    notes: Sequence[str] = ()

    def lines(self, half: Half | None = None) -> dict[str, Line]:
        """The measures of each point that has any answer, on one half of every set or on all."""
        found = lines(self.answers.rows, half)
        return {point.model: found[point.model] for point in self.points if point.model in found}

    def candidates(self, half: Half | None = None) -> dict[str, Line]:
        """The lines of the points that lack no answer, if there are any: only these are compared with one another,
        since a point whose harmful prompts failed would look harmless.
        """
        found, lacking = self.lines(half), {model for model, *_ in self.answers.missing}
        return {model: one for model, one in found.items() if model not in lacking} or found


def spread(points: Sequence[Point], count: int) -> list[Point]:
    """`count` of the points at even distances, the ends left out where there are others."""
    inner = points[1:-1] if len(points) >= count + 2 else points
    if count >= len(inner):
        return list(inner)
    return [inner[round((index + 0.5) * len(inner) / count - 0.5)] for index in range(count)]


def controls(
    endpoint: Endpoint, points: Sequence[Point], safety: str, count: int = CONTROLS
) -> tuple[list[Point], list[str]]:
    """The controls of a sweep, and a sentence for each that cannot be had here."""
    found, notes = [Point(endpoint.base(), "control", "base")], []
    recipes = [point.model for point in points]
    names = [name for name in endpoint.adapters() if any(uses(recipe, name) for recipe in recipes)]
    found += [Point(f"1*{name}", "control", "single adapter") for name in names]
    others = [name for name in names if name != safety]
    fused = [p for p in points if uses(p.model, safety) and any(uses(p.model, name) for name in others)]
    chosen = spread(fused, count)
    if not chosen:
        return found, [f"no point fuses an adapter with {safety!r}: only the base and single adapters are controls"]
    try:
        other = random_adapter(endpoint, safety)
    except EndpointError as error:
        other = ""
        notes.append(f"the random control is left out: {error}")
    for point in chosen:
        alone = without(point.model, safety)
        if alone is not None:
            found.append(Point(alone, "control", "safety adapter left out", point.values))
        if other:
            mixed = replaced(point.model, safety, other)
            found.append(Point(mixed, "control", "random adapter instead", point.values))
    if any(without(point.model, safety) is None for point in chosen):
        notes.append("what is no plain sum has no control with the safety adapter left out")
    return found, notes


def unique(points: Iterable[Point]) -> list[Point]:
    """Each model once, the first of its points."""
    found: dict[str, Point] = {}
    for point in points:
        found.setdefault(point.model, point)
    return list(found.values())


def planned(endpoint: Endpoint, points: Sequence[Point], known: Mapping[str, Plan]) -> dict[str, Plan]:
    """Plans of all points but the base, those `known` as they are; empty when the endpoint is no fusion service."""
    if not endpoint.fuses():
        return {}
    base = endpoint.base()
    models = [point.model for point in points if point.model != base]
    return {model: known.get(model) or Plan.of(endpoint, model) for model in models}


def waves(points: Sequence[Point], plans: Mapping[str, Plan]) -> list[list[Point]]:
    """Mixed points together, built ones one by one."""
    built = [point for point in points if point.model in plans and not plans[point.model].mixed]
    together = [point for point in points if point not in built]
    return ([together] if together else []) + [[point] for point in built]


def unfinished(points: Sequence[Point], answers: Answers, wanted: int) -> list[Point]:
    """The points that lack some of the `wanted` answers."""
    have = Counter(row.model for row in answers.rows)
    return [point for point in points if have[point.model] < wanted]


def sweep(
    endpoint: Endpoint,
    points: Sequence[Point],
    tasks: Callable[[], Sequence[Task]],
    folder: Path,
    how: Running,
    *,
    plans: Mapping[str, Plan] | None = None,
    notes: Sequence[str] = (),
) -> Sweep:
    """Measures every point that `folder` does not hold whole, and reads all results; what failed is listed in the
    answers' `missing`. `tasks` makes the tasks anew for each wave; `plans` are those known from an earlier round.
    """
    points = unique(points)
    plans = planned(endpoint, points, plans or {})
    same_fusions(folder, {model: plan.digest for model, plan in plans.items()})
    save_points(folder, points)
    wanted = how.seeds * sum(len(task.dataset) for task in tasks())
    todo = waves(unfinished(points, read(folder), wanted), plans)
    for number, wave in enumerate(todo, 1):
        what = f"{len(wave)} points in one batch" if len(wave) > 1 else wave[0].model
        print(f"wave {number} of {len(todo)}: {what}", file=sys.stderr, flush=True)
        run(tasks(), endpoint, [point.model for point in wave], folder, how)
    return Sweep(points, plans, read(folder), notes)


def save_points(folder: Path, points: Sequence[Point]) -> None:
    """`points.json`: what the report is about, kept with points of earlier rounds."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {point.model: point for point in load_points(folder)} | {point.model: point for point in points}
    text = json.dumps([asdict(point) for point in kept.values()], indent=1, ensure_ascii=False)
    (folder / "points.json").write_text(text + "\n", encoding="utf-8")


def load_points(folder: Path) -> list[Point]:
    """The points that `folder` is about, none when it is new."""
    path = folder / "points.json"
    return [Point(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []


def scorecards(endpoint: Endpoint, found: Sweep, made: Mapping[str, str]) -> int:
    """Attaches the measures of each point that lacks no answer to its fusion digest; how many were attached.

    `made` says when, by which command and on which sets. `half_report` of a card is what was measured on the half that
    no weight was chosen on. The same measures are attached once.
    """
    count, lacking = 0, {model for model, *_ in found.answers.missing}
    reported = found.lines("report")
    for model, one in found.lines().items():
        plan = found.plans.get(model)
        if plan is not None and model not in lacking:
            half = {"half_report": reported[model].to_json()} if model in reported else {}
            count += publish(endpoint, plan.digest, made, one.to_json() | half)
    return count
