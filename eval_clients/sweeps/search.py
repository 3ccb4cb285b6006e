"""Refine a sweep around its best points, within a budget of requests: compass search over weights, in several forms.

A form is a template over the weights t (task) and s (safety): the plain sum with both weights free, layer schedules,
other methods. Every form is tried at the best weights so far; then the best two are refined by steps that are halved
when none helps. All choices look at the first half of every set only; the report shows the other.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from inspect_ai import Task

from eval_clients.endpoint import Endpoint, EndpointError, Plan
from eval_clients.running import Running
from eval_clients.sweeps.choice import Limit, best, order
from eval_clients.sweeps.controls import terms
from eval_clients.sweeps.points import Point, filled
from eval_clients.sweeps.sweep import Sweep, sweep, unique

FORMS = (
    "{t}*TASK + {s}*SAFETY",
    "{t}*TASK + ramp({s*0.5}..{s*1.5})*SAFETY",
    "{t}*TASK + ramp({s*1.5}..{s*0.5})*SAFETY",
    "{t}*TASK + ramp(0..{s*2})*SAFETY",
    "ties({t}*TASK + {s}*SAFETY, density=0.5)",
    "knots({t}*TASK + {s}*SAFETY)",
    "dare_ties({t}*TASK + {s}*SAFETY, density=0.7)",
    "{t}*TASK + SAFETY_MLP",
    "{t}*TASK + SAFETY_ATTENTION",
)
"""TASK and SAFETY stand for the adapters' names."""
BLOCKS = {"SAFETY_MLP": "*.mlp.*", "SAFETY_ATTENTION": "*.self_attn.*"}
"""Three halves of s in the modules of the pattern, half of s in the others."""
STEPS = (0.1, 0.05, 0.025)
HIGHEST = 1.5


def recipe(form: str, t: float, s: float, task: str, safety: str) -> str:
    """The form at weights t and s, over the adapters' names."""
    text = filled(form, {"t": t, "s": s})
    for name, pattern in BLOCKS.items():
        text = text.replace(name, f"{{{pattern}: {round(1.5 * s, 6):g}, *: {round(0.5 * s, 6):g}}}*SAFETY")
    names = {"TASK": task, "SAFETY": safety}
    return re.sub("TASK|SAFETY", lambda role: names[role[0]], text)


def point(form: str, t: float, s: float, task: str, safety: str) -> Point:
    """A search point."""
    t, s = round(t, 6), round(s, 6)
    return Point(recipe(form, t, s, task, safety), "search", form, {"t": t, "s": s})


def neighbours(form: str, t: float, s: float, step: float, task: str, safety: str) -> list[Point]:
    """One step in each direction of both weights, inside [0, HIGHEST]."""
    moves = ((step, 0), (-step, 0), (0, step), (0, -step), (step, -step), (-step, step))
    places = [(t + dt, s + ds) for dt, ds in moves]
    inside = [(a, b) for a, b in places if 0 <= a <= HIGHEST and 0 <= b <= HIGHEST and a + b > 0]
    return [point(form, a, b, task, safety) for a, b in inside]


def weights(model: str, safety: str) -> tuple[str, float, float] | None:
    """(task adapter, t, s) of a plain sum of two adapters; None for any other recipe."""
    parts = terms(model)
    others = [term for term in parts if term.name != safety]
    mine = [term for term in parts if term.name == safety]
    if len(others) != 1 or len(mine) != 1:
        return None
    return others[0].name, others[0].weight, mine[0].weight


def search(
    endpoint: Endpoint,
    first: Sweep,
    safety: str,
    limits: Sequence[Limit],
    tasks: Callable[[], Sequence[Task]],
    folder: Path,
    how: Running,
    budget: int,
) -> Sweep:
    """The sweep with the points of the search; at most `budget` answers are asked for (a judge's calls, second turns
    and echoes come on top). A form that the service refuses is left out with a note.

    EndpointError when the sweep holds no sum of one adapter with `safety` to start from.
    """
    known, per_point = first, how.seeds * sum(len(task.dataset) for task in tasks())
    lines = known.candidates("choose")
    pairs = {p.model: pair for p in first.points if p.model in lines and (pair := weights(p.model, safety))}
    if not pairs:
        raise EndpointError(f"--search starts from a sum of one adapter with {safety!r}; the sweep measured none")
    start, _ = best({model: lines[model] for model in pairs}, limits, lines)
    task, t, s = pairs[start]
    home = Point(start, "search", FORMS[0], {"t": t, "s": s})
    wanted = [point(form, t, s, task, safety) for form in FORMS]
    wanted += neighbours(FORMS[0], t, s, STEPS[0], task, safety)
    step = 0
    while step < len(STEPS) and budget >= per_point:
        asked = {p.model for p in known.points}
        fresh, known = _accepted(endpoint, [p for p in unique(wanted) if p.model not in asked], known)
        fresh = fresh[: budget // per_point]
        if fresh:
            budget -= per_point * len(fresh)
            print(f"search: {len(fresh)} points, step {STEPS[step]:g}; {budget} answers left", file=sys.stderr)
            points = [*known.points, *fresh]
            known = sweep(endpoint, points, tasks, folder, how, plans=known.plans, notes=known.notes)
        else:
            step += 1
        lines = known.candidates("choose")
        found = [home, *(p for p in known.points if p.kind == "search")]
        seen = [p for p in found if p.model in lines]
        by_form: dict[str, Point] = {}
        for one in sorted(seen, key=lambda p: order(lines[p.model], limits, lines)):
            by_form.setdefault(one.series, one)
        wanted = [
            near
            for one in list(by_form.values())[:2]
            for near in neighbours(one.series, one.values["t"], one.values["s"], STEPS[min(step, 2)], task, safety)
        ]
    return known


def _accepted(endpoint: Endpoint, points: Sequence[Point], known: Sweep) -> tuple[list[Point], Sweep]:
    """The points that the service would serve, and the sweep with their plans and a note for each of the others."""
    if not known.plans:
        return list(points), known
    plans, notes, kept = dict(known.plans), list(known.notes), []
    for one in points:
        try:
            plans[one.model] = plans.get(one.model) or Plan.of(endpoint, one.model)
            kept.append(one)
        except EndpointError as error:
            notes.append(f"left out of the search: {error}")
    return kept, replace(known, plans=plans, notes=list(dict.fromkeys(notes)))
