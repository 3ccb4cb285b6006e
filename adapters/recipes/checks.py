"""What both forms of a recipe, text and JSON, must fulfil: terms, methods, options."""

from __future__ import annotations

import math
from collections.abc import Mapping

from adapters.errors import RecipeError, did_you_mean, quoted
from adapters.recipes.methods import METHODS, Method, Option, Value
from adapters.recipes.recipe import MAX_TERMS, Term, check_name
from adapters.recipes.weights import ByModule, Ramp, Weight

MAX_RULES = 64


def add_rule(rules: dict[str, float], pattern: str, weight: float, position: int | None) -> None:
    """Check one rule of a schedule and add it to `rules`."""
    if pattern in rules:
        raise RecipeError(f"the pattern {pattern!r} appears twice: keep one", position)
    if len(rules) >= MAX_RULES:
        raise RecipeError(f"a weight has at most {MAX_RULES} patterns", position)
    rules[pattern] = weight + 0.0


def add_term(
    terms: dict[str, Term],
    name: str,
    weight: Weight,
    max_weight: float,
    *,
    weight_at: int | None = None,
    name_at: int | None = None,
) -> None:
    """Check one term and add it to `terms`."""
    check_name(name, name_at)
    if name in terms:
        raise RecipeError(f"adapter {name!r} appears twice: add its weights up into one term", name_at)
    for value in numbers_of(weight):
        if not abs(value) <= max_weight or not math.isfinite(value):
            raise RecipeError(
                f"the weight {quoted(value)} of {name!r} is out of range: expected |weight| <= {max_weight:g}",
                weight_at,
            )
    if len(terms) >= MAX_TERMS:
        raise RecipeError(f"a recipe has at most {MAX_TERMS} adapters", name_at)
    terms[name] = Term(name, weight)


def numbers_of(weight: Weight) -> tuple[float, ...]:
    """Every number a weight is made of."""
    match weight:
        case Ramp(first, last):
            return first, last
        case ByModule(rules):
            return tuple(value for _, value in rules)
    return (weight,)


def find_method(name: object, position: int | None) -> Method:
    """The row of that name; RecipeError naming the known ones."""
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        hint = did_you_mean(str(name), METHODS) or f"known methods are {', '.join(METHODS)}"
        raise RecipeError(f"unknown method {quoted(name)}: {hint}", position)
    return method


def find_option(method: Method, name: object, position: int | None) -> Option:
    """The method's option of that name; RecipeError naming those it has."""
    for option in method.options:
        if option.name == name:
            return option
    known = ", ".join(option.name for option in method.options) or "none"
    raise RecipeError(f"method {method.name!r} has no option {quoted(name)}: its options are {known}", position)


def check_option(option: Option, value: object, terms: tuple[Term, ...], position: int | None) -> Value:
    """`value` as the option's kind and within its bounds, or RecipeError."""
    wrong = f"option {option.name!r} = {quoted(value)}"
    names = {term.adapter for term in terms}
    if option.kind == "term":
        if not isinstance(value, str) or value not in names:
            raise RecipeError(f"{wrong}: expected the name of one of the recipe's adapters", position)
        return value
    if option.kind == "adapter":
        if not isinstance(value, str):
            raise RecipeError(f"{wrong}: expected the name of an adapter", position)
        if check_name(value, position) in names:
            raise RecipeError(f"{wrong} is a term already: an adapter that plays a role has no weight", position)
        return value
    if option.kind == "choice":
        if value not in option.choices:
            raise RecipeError(f"{wrong}: expected one of {', '.join(option.choices)}", position)
        return str(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f"{wrong}: expected a number", position)
    if option.kind == "int" and not isinstance(value, int):
        raise RecipeError(f"{wrong}: expected a whole number", position)
    if not option.minimum <= value <= option.maximum or not math.isfinite(value):
        raise RecipeError(f"{wrong}: expected {option.minimum:g} to {option.maximum:g}", position)
    return value if option.kind == "int" else float(value)


def require(method: Method, options: Mapping[str, Value], terms: tuple[Term, ...], position: int | None) -> None:
    """RecipeError when an option without a default was not given, or the number of terms cannot be."""
    for option in method.options:
        if option.default is None and option.name not in options:
            raise RecipeError(f"method {method.name!r} needs the option {option.name!r}: {option.help}", position)
    least, most = method.terms
    if not least <= len(terms) <= most:
        expected = str(least) if least == most else f"{least} to {most}"
        raise RecipeError(f"method {method.name!r} takes {expected} adapters, got {len(terms)}", position)
