"""Controls of a sweep: what a fusion must beat before its effect can be credited to the safety adapter.

* the base and every adapter alone,
* the fusion as in the sweep with the safety adapter left out,
* the fusion with a random adapter of the same norm, module by module, in the safety adapter's place,
* of a fusion with a gate, the one with its default weights for every prompt; `gates` has more, from what it chose.

An adapter that only acts on answers in the sweep does so in its controls.
"""

from collections.abc import Collection, Sequence
from typing import TypeVar

from adapters.recipes import Recipe, RecipeError
from eval_clients.endpoint import Endpoint
from eval_clients.errors import EndpointError
from eval_clients.sweeps.answer_only import single_model
from eval_clients.sweeps.points import Point
from eval_clients.sweeps.random_adapter import register_random_adapter

COUNT = 3
"""Points of the grid at which controls are measured, spread over it."""
Item = TypeVar("Item")


def pick_evenly(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items at even distances, without both ends where enough others remain."""
    inner = items[1:-1] if len(items) >= count + 2 else items
    if count >= len(inner):
        return list(inner)
    return [inner[round((index + 0.5) * len(inner) / count - 0.5)] for index in range(count)]


def format_model(recipe: Recipe) -> str:
    """The recipe as a point names it: canonical, but with the weight of a single adapter (`1*task`)."""
    text = recipe.format()
    return f"1*{text}" if recipe == Recipe.single(recipe.adapters[0]) else text


def build_controls(
    endpoint: Endpoint,
    points: Sequence[Point],
    safety: str,
    count: int = COUNT,
    *,
    answer_only: Collection[str] = (),
) -> tuple[list[Point], list[str]]:
    """The controls of a sweep, and a sentence for each that cannot be measured here. `answer_only` are the adapters
    that act on the answer alone.
    """
    controls, notes = [Point(endpoint.base(), "control", "base")], []
    recipes = [(point, recipe) for point in points if (recipe := point.recipe) is not None]
    used = {name for _, recipe in recipes for name in recipe.adapters}
    names = [name for name in endpoint.adapters() if name in used]
    anywhere = {name for _, recipe in recipes if not recipe.answer for name in recipe.adapters}
    singles = [single_model(name, answer_only=name in answer_only or name not in anywhere) for name in names]
    controls += [Point(model, "control", "single adapter") for model in singles]
    others = {*names} - {safety}
    fusions = [(p, r) for p, r in recipes if safety in r.adapters and others.intersection(r.adapters)]
    if not fusions:
        note = f"no point fuses an adapter with {safety!r}: only the base and single adapters are controls"
        return controls, [note]
    try:
        random_name = register_random_adapter(endpoint, safety, answer_only=safety in answer_only)
    except EndpointError as error:
        random_name = ""
        notes.append(f"the random control is left out: {error}")
    for point, recipe in pick_evenly(fusions, count):
        try:
            alone = format_model(recipe.without(safety))
            controls.append(Point(alone, "control", "safety adapter left out", point.values))
        except RecipeError as error:
            notes.append(f"a control with the safety adapter left out is missing: {error}")
        if random_name:
            replaced = format_model(recipe.rename({safety: random_name}))
            controls.append(Point(replaced, "control", "random adapter instead", point.values))
        if recipe.gate is not None:
            controls.append(Point(format_model(recipe.choose({})), "control", "gate left out", point.values))
    return controls, notes
