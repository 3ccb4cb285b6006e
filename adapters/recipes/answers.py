"""Adapters that act on the answer alone: whether a recipe leaves the prompt to the base."""

from collections.abc import Collection
from dataclasses import replace

from adapters.errors import RecipeError, clip
from adapters.recipes.grammar import parse
from adapters.recipes.names import find_name, name_text
from adapters.recipes.recipe import Recipe
from adapters.recipes.weights import Ramp, list_numbers, weight_text


def check_prompt(recipe: Recipe, answer_only: Collection[str], text: str = "") -> None:
    """RecipeError, which names the way out and the place in the recipe's `text`, when the recipe lets one of these
    adapters act on the prompt: they were trained on what the base alone makes of it.
    """
    name = min(_list_prompt_adapters(recipe) & set(answer_only), default=None) if answer_only else None
    if name is not None:
        ways = " or ".join(_list_ways(recipe, name))
        raise RecipeError(
            f"{name!r} is an answer-only adapter, but {clip(repr(recipe.format()))} lets it act on the prompt: "
            f"expected {ways}",
            find_name(name, text),
        )


def _list_prompt_adapters(recipe: Recipe) -> set[str]:
    """The adapters that act on the prompt: those with a weight there, and with them those in a role."""
    if recipe.answer:
        return set()
    _, prompt = recipe.choose({}).phases()[0]
    bounds = () if recipe.gate is None else recipe.gate.bounds
    used = {term.adapter for term in prompt.terms if any(list_numbers(term.weight))}
    used |= {name for name, limits in bounds if any(limits)}
    return used | set(recipe.roles.values()) if used else set()


def _list_ways(recipe: Recipe, name: str) -> list[str]:
    """What to write instead; a sum inside `answer(…)` where the method has no weights by position."""
    ways = []
    text = replace(recipe, answer=True).format()
    try:
        parse(text, max_weight=float("inf"))
    except RecipeError:  # a weight for the prompt inside, or a method that takes no weights by position
        if not recipe.is_linear:
            return ["a weighted sum inside answer(…)"]
    else:
        ways.append(clip(repr(text)))
    if name in recipe.weights:
        weight = recipe.weights[name]
        level = weight_text(weight) if isinstance(weight, float | Ramp) else "…"
        ways.append(f"'steps(0: {level})*{name_text(name)}'")
    return ways
