"""The JSON form of a recipe: `{"adapters": [{"name", "weight"}, …], "method": …, option: …}`."""

import math
from collections.abc import Mapping
from itertools import starmap

from adapters.errors import RecipeError, quote
from adapters.recipes import checks
from adapters.recipes.grammar import PATTERN, RAMP, check_length
from adapters.recipes.method import Value
from adapters.recipes.methods import DEFAULT_METHOD
from adapters.recipes.recipe import Recipe, Term
from adapters.recipes.weights import ByModule, Ramp, Weight


def from_json(obj: object, *, max_weight: float = checks.MAX_WEIGHT) -> Recipe:
    """Read the JSON form; RecipeError for anything but a valid recipe."""
    if not isinstance(obj, Mapping):
        raise RecipeError(f'a fusion in JSON form is an object like {{"adapters": […]}}, got {quote(obj)}')
    entries = obj.get("adapters")
    if not isinstance(entries, list | tuple) or not entries:
        raise RecipeError(f"'adapters' must be a list with at least one entry, got {quote(entries)}")
    weights: dict[str, Weight] = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or "name" not in entry or not set(entry) <= {"name", "weight"}:
            raise RecipeError(f"'adapters[{index}]' must be {{name, weight}}, got {quote(entry)}")
        name, weight = entry["name"], entry.get("weight", 1.0)
        if not isinstance(name, str):
            raise RecipeError(f"'adapters[{index}].name' must be a string, got {quote(name)}")
        checks.add_term(weights, name, _read_weight(weight, f"adapters[{index}].weight"), max_weight)
    method = checks.find_method(obj.get("method", DEFAULT_METHOD), None)
    options: dict[str, Value] = {}
    for key, value in obj.items():
        if key not in ("adapters", "method"):
            option = checks.find_option(method, key, None)
            options[option.name] = checks.check_option(option, value, weights, None)
    checks.check_arity(method, options, len(weights), None)
    return check_length(Recipe(method.name, tuple(starmap(Term, weights.items())), tuple(options.items())))


def _read_weight(value: object, where: str) -> Weight:
    """A weight of the JSON form: a number, `{"ramp": [first, last]}` or `{pattern: number, …}`."""

    def number(raw: object) -> float:
        if isinstance(raw, bool) or not isinstance(raw, int | float):
            raise RecipeError(f"{where!r} must be a number, got {quote(raw)}")
        return float(raw) if abs(raw) < 1e300 else math.inf

    if not isinstance(value, Mapping):
        return number(value)
    ramp = value.get(RAMP)
    if isinstance(ramp, list | tuple):
        if len(ramp) != 2 or len(value) != 1:
            raise RecipeError(f'{where!r} must be {{"ramp": [first, last]}}, got {quote(value)}')
        return Ramp(number(ramp[0]), number(ramp[1]))
    rules: dict[str, float] = {}
    for pattern, weight in value.items():
        if not isinstance(pattern, str) or PATTERN.fullmatch(pattern) is None:
            raise RecipeError(f"{where!r} has {quote(pattern)}: expected a pattern of module names, as in '*.mlp.*'")
        checks.add_rule(rules, pattern, number(weight), None)
    if not rules:
        raise RecipeError(f"{where!r} is empty: expected a number or patterns of module names")
    return ByModule(tuple(rules.items()))
