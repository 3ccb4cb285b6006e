"""Refine a sweep around its best points, within a budget of requests: compass search over weights, in several forms.

A form is a template over the weights t (task) and s (safety): the plain sum with both weights free, weights by layer
and position, other methods. Every form is tried at the best weights so far; then the best two are refined by steps that
are halved when none helps. All choices look at one half of every set only; the report shows the other.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from adapters.recipes import name_text
from eval_clients.endpoint import Plan
from eval_clients.errors import EndpointError
from eval_clients.sweeps.choice import Limit, choose_best, rank_key
from eval_clients.sweeps.points import Point, fill_template
from eval_clients.sweeps.sweep import Sweep, drop_repeats

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
    "{t}*TASK + fade({s*1.5}..{s*0.5}, 8)*SAFETY",
    "answer({t}*TASK + {s}*SAFETY)",
)
"""TASK and SAFETY stand for the adapters' names."""
BUILT = ("ties(", "knots(", "dare_ties(")
"""How forms begin whose methods take no weights by position."""
BLOCKS = {"SAFETY_MLP": "*.mlp.*", "SAFETY_ATTENTION": "*.self_attn.*"}
"""Weight 1.5 s in the modules of the pattern, 0.5 s in the others."""
STEPS = (0.1, 0.05, 0.025)
"""How far both weights move, from coarse to fine."""
MAX_WEIGHT = 1.5
BEST_FORMS = 2
"""Forms that are refined."""

Adapters = Mapping[str, str]
"""The adapters' names by what stands for them in a form."""


def refine_sweep(
    sweep: Sweep,
    safety: str,
    limits: Sequence[Limit],
    *,
    budget: int,
    cost: int,
    plan: Callable[[str], Plan],
    measure: Callable[[Sweep], Sweep],
) -> Sweep:
    """The sweep with the points of the search, starting from its best sum of one adapter with `safety`.

    `measure` returns a sweep with the answers of all its points, `cost` answers for each new one; at most `budget`
    answers are requested (a judge's calls, second turns and echoes come on top). `plan` raises EndpointError for a
    form that the service rejects, which is left out with a note. EndpointError when the sweep has no point to start
    from.
    """
    start, adapters = find_start(sweep, safety, limits)
    candidates = [make_point(form, start.values["t"], start.values["s"], adapters) for form in list_forms(start)]
    candidates += make_neighbors(start, STEPS[0], adapters)
    step = 0
    while step < len(STEPS) and budget >= cost:
        measured = {point.model for point in sweep.points}
        new, sweep = _admit((point for point in drop_repeats(candidates) if point.model not in measured), sweep, plan)
        new = new[: budget // cost]
        if new:
            budget -= cost * len(new)
            print(f"search: {len(new)} points, step {STEPS[step]:g}; {budget} answers left", file=sys.stderr)
            sweep = measure(replace(sweep, points=[*sweep.points, *new]))
        else:
            step += 1
        best = _best_by_form(sweep, start, limits)[:BEST_FORMS]
        candidates = [near for point in best for near in make_neighbors(point, STEPS[min(step, 2)], adapters)]
    return sweep


def list_forms(start: Point) -> Iterable[str]:
    """The forms to try; inside `answer(…)` where the start is, except for methods that take no weights by position."""
    if start.series == FORMS[0]:
        return FORMS
    return [form if form.startswith(("answer", *BUILT)) else f"answer({form})" for form in FORMS]


def find_start(sweep: Sweep, safety: str, limits: Sequence[Limit]) -> tuple[Point, Adapters]:
    """The best measured sum of one adapter with `safety`, on the answer alone or on all, as a point of the first form,
    and the adapters' names.

    EndpointError when none was measured.
    """
    scores = sweep.candidates("choose")
    starts: dict[str, tuple[Point, Adapters]] = {}
    for point in sweep.points:
        recipe = point.recipe
        if point.model not in scores or recipe is None or len(recipe.terms) != 2:
            continue
        form = f"answer({FORMS[0]})" if recipe.answer else FORMS[0]
        if not replace(recipe, answer=False).is_sum:
            continue
        weights = {term.adapter: term.weight for term in recipe.terms}
        if safety in weights:
            (task,) = weights.keys() - {safety}
            values = {"t": weights[task], "s": weights[safety]}
            start = Point(point.model, "search", form, values)  # type: ignore[arg-type]  # numbers in a plain sum
            starts[point.model] = start, {"TASK": task, "SAFETY": safety}
    if not starts:
        raise EndpointError(f"the search starts from a sum of one adapter with {safety!r}; the sweep measured none")
    best, _ = choose_best({model: scores[model] for model in starts}, limits, scores)
    return starts[best]


def make_point(form: str, t: float, s: float, adapters: Adapters) -> Point:
    """The form at weights t and s."""
    t, s = round(t, 6), round(s, 6)
    text = fill_template(form, {"t": t, "s": s})
    for name, pattern in BLOCKS.items():
        text = text.replace(name, f"{{{pattern}: {round(1.5 * s, 6):g}, *: {round(0.5 * s, 6):g}}}*SAFETY")
    recipe = re.sub("TASK|SAFETY", lambda match: name_text(adapters[match[0]]), text)
    return Point(recipe, "search", form, {"t": t, "s": s})


def make_neighbors(point: Point, step: float, adapters: Adapters) -> list[Point]:
    """One step in each direction of both weights, inside [0, MAX_WEIGHT]."""
    t, s = point.values["t"], point.values["s"]
    moves = ((step, 0), (-step, 0), (0, step), (0, -step), (step, -step), (-step, step))
    weights = [(t + dt, s + ds) for dt, ds in moves]
    return [
        make_point(point.series, t, s, adapters)
        for t, s in weights
        if 0 <= t <= MAX_WEIGHT and 0 <= s <= MAX_WEIGHT and t + s > 0
    ]


def _best_by_form(sweep: Sweep, start: Point, limits: Sequence[Limit]) -> list[Point]:
    """The best point of each form, the best form first."""
    scores = sweep.candidates("choose")
    points = [point for point in (start, *sweep.points) if point.kind == "search" and point.model in scores]
    best: dict[str, Point] = {}
    for point in sorted(points, key=lambda point: rank_key(scores[point.model], limits, scores)):
        best.setdefault(point.series, point)
    return list(best.values())


def _admit(points: Iterable[Point], sweep: Sweep, plan: Callable[[str], Plan]) -> tuple[list[Point], Sweep]:
    """The points that the service would serve, and the sweep with their plans and a note for each of the others."""
    if not sweep.plans:  # no fusion service
        return list(points), sweep
    plans, notes, admitted = dict(sweep.plans), list(sweep.notes), []
    for point in points:
        try:
            plans[point.model] = plans.get(point.model) or plan(point.model)
            admitted.append(point)
        except EndpointError as error:
            notes.append(f"left out of the search: {error}")
    return admitted, replace(sweep, plans=plans, notes=list(dict.fromkeys(notes)))
