"""Reads the JSON form of a recipe into a checked `Recipe`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from adapters.errors import RecipeError, quoted
from adapters.recipes.checks import add_rule, add_term, check_option, find_method, find_option, require
from adapters.recipes.grammar import PATTERN, RAMP
from adapters.recipes.methods import DEFAULT_METHOD, Value
from adapters.recipes.recipe import Recipe, Term
from adapters.recipes.weights import ByModule, Ramp, Weight


def read_json(obj: object, max_weight: float) -> Recipe:
    """The JSON form as a recipe; see `recipe.from_json`."""
    if not isinstance(obj, Mapping):
        raise RecipeError(f'a fusion in JSON form is an object like {{"adapters": […]}}, got {quoted(obj)}')
    entries = obj.get("adapters")
    if not isinstance(entries, list | tuple) or not entries:
        raise RecipeError(f"'adapters' must be a list with at least one entry, got {quoted(entries)}")
    terms: dict[str, Term] = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or "name" not in entry or not set(entry) <= {"name", "weight"}:
            raise RecipeError(f"'adapters[{index}]' must be {{name, weight}}, got {quoted(entry)}")
        name, weight = entry["name"], entry.get("weight", 1.0)
        if not isinstance(name, str):
            raise RecipeError(f"'adapters[{index}].name' must be a text, got {quoted(name)}")
        add_term(terms, name, json_weight(weight, f"adapters[{index}].weight"), max_weight)
    method_name = obj.get("method", DEFAULT_METHOD)
    method = find_method(method_name, None)
    options: dict[str, Value] = {}
    for key, value in obj.items():
        if key not in ("adapters", "method"):
            option = find_option(method, key, None)
            options[option.name] = check_option(option, value, tuple(terms.values()), None)
    require(method, options, tuple(terms.values()), None)
    return Recipe(method.name, tuple(terms.values()), tuple(options.items()))


def json_weight(value: object, where: str) -> Weight:
    """A weight of the JSON form: a number, `{"ramp": [first, last]}` or `{pattern: number, …}`."""

    def number(one: object) -> float:
        if isinstance(one, bool) or not isinstance(one, int | float):
            raise RecipeError(f"{where!r} must be a number, got {quoted(one)}")
        return float(one) if abs(one) < 1e300 else math.inf

    if not isinstance(value, Mapping):
        return number(value)
    ramp = value.get(RAMP)
    if isinstance(ramp, list | tuple):
        if len(ramp) != 2 or len(value) != 1:
            raise RecipeError(f'{where!r} must be {{"ramp": [first, last]}}, got {quoted(value)}')
        return Ramp(number(ramp[0]), number(ramp[1]))
    rules: dict[str, float] = {}
    for pattern, weight in value.items():
        if not isinstance(pattern, str) or PATTERN.fullmatch(pattern) is None:
            raise RecipeError(f"{where!r} has {quoted(pattern)}: expected a pattern of module names, as in '*.mlp.*'")
        add_rule(rules, pattern, number(weight), None)
    if not rules:
        raise RecipeError(f"{where!r} is empty: expected a number or patterns of module names")
    return ByModule(tuple(rules.items()))
