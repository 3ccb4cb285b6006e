"""Sweeps of adapters that act on the answer alone: every point inside `answer(…)`, so that all share each prompt."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from adapters.recipes import RecipeError, name_text, parse
from eval_clients.sweeps.points import Point

NOTE = "all adapters act on the answer alone, so every point is inside answer(…) and shares each prompt's computation"


def answer_points(points: Sequence[Point], adapters: Collection[str], answer_only: Collection[str]) -> Sequence[Point]:
    """The points inside `answer(…)` when all of the `adapters` that they name are `answer_only`; else as they are.
    Points of other names, such as a profile's, stay.
    """
    named = {name for point in points if (recipe := point.recipe) is not None for name in recipe.adapters}
    used = named & set(adapters)
    if not used or not used <= set(answer_only):
        return points
    return [_answer_point(point, used) for point in points]


def _answer_point(point: Point, used: Collection[str]) -> Point:
    if point.recipe is None or not set(point.recipe.adapters) <= set(used):
        return point
    model = answer(point.model)
    if model == point.model:
        return point
    return replace(point, model=model, series=point.series if "gate(" in model else f"answer({point.series})")


def answer(text: str) -> str:
    """A recipe inside `answer(…)`, and that inside its gate; as it is when it cannot be, or is already."""
    recipe = parse(text, max_weight=math.inf)
    if recipe.answer:
        return text
    inside = f"answer({text})" if recipe.gate is None else replace(recipe, answer=True).format()
    try:
        parse(inside, max_weight=math.inf)
    except RecipeError:  # weights for the prompt, or a method that takes none by position
        return text
    return inside


def single_model(name: str, *, answer_only: bool) -> str:
    """The recipe of an adapter alone at weight 1."""
    text = f"1*{name_text(name)}"
    return f"answer({text})" if answer_only else text
