"""What both forms of a recipe, text and JSON, must fulfill: terms, methods, options."""

import math
from collections.abc import Collection, Mapping

from adapters.errors import RecipeError, did_you_mean, quote
from adapters.recipes.method import Method, Option, Value
from adapters.recipes.methods import METHODS
from adapters.recipes.names import check_name
from adapters.recipes.weights import ByModule, Ramp, Weight

MAX_TERMS = 64
MAX_RULES = 64
MAX_WEIGHT = 16.0


def add_rule(rules: dict[str, float], pattern: str, weight: float, position: int | None) -> None:
    """Check one rule of a schedule and add it to `rules`."""
    if pattern in rules:
        raise RecipeError(f"the pattern {pattern!r} appears twice: keep one", position)
    if len(rules) >= MAX_RULES:
        raise RecipeError(f"a weight has at most {MAX_RULES} patterns", position)
    rules[pattern] = weight + 0.0


def add_term(
    weights: dict[str, Weight],
    name: str,
    weight: Weight,
    max_weight: float,
    *,
    weight_at: int | None = None,
    name_at: int | None = None,
) -> None:
    """Check one term and add it to `weights`, by adapter name."""
    check_name(name, name_at)
    if name in weights:
        raise RecipeError(f"adapter {name!r} appears twice: add its weights up into one term", name_at)
    for number in weight_numbers(weight):
        if not abs(number) <= max_weight or not math.isfinite(number):
            raise RecipeError(
                f"the weight {quote(number)} of {name!r} is out of range: expected |weight| <= {max_weight:g}",
                weight_at,
            )
    if len(weights) >= MAX_TERMS:
        raise RecipeError(f"a recipe has at most {MAX_TERMS} adapters", name_at)
    weights[name] = weight


def weight_numbers(weight: Weight) -> tuple[float, ...]:
    """Every number a weight is made of."""
    match weight:
        case Ramp(first, last):
            return first, last
        case ByModule(rules):
            return tuple(number for _, number in rules)
    return (weight,)


def find_method(name: object, position: int | None) -> Method:
    """The row of that name; RecipeError naming the known ones."""
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        hint = (
            did_you_mean(name, METHODS) if isinstance(name, str) else ""
        ) or f"known methods are {', '.join(METHODS)}"
        raise RecipeError(f"unknown method {quote(name)}: {hint}", position)
    return method


def find_option(method: Method, name: object, position: int | None) -> Option:
    """The method's option of that name; RecipeError naming those it has."""
    for option in method.options:
        if option.name == name:
            return option
    hint = (
        did_you_mean(name, method.kinds) if isinstance(name, str) else ""
    ) or f"its options are {', '.join(method.kinds) or 'none'}"
    raise RecipeError(f"method {method.name!r} has no option {quote(name)}: {hint}", position)


def check_option(option: Option, value: object, terms: Collection[str], position: int | None) -> Value:
    """`value` as the option's kind and within its bounds, or RecipeError; `terms` are the names of the terms."""

    def fail(expected: str) -> RecipeError:
        return RecipeError(f"option {option.name!r} = {quote(value)}: expected {expected}", position)

    if option.kind == "term":
        if not isinstance(value, str) or value not in terms:
            raise fail("the name of one of the recipe's adapters")
        return value
    if option.kind == "adapter":
        if not isinstance(value, str):
            raise fail("the name of an adapter")
        if check_name(value, position) in terms:
            raise RecipeError(
                f"option {option.name!r}: {value!r} is a term already, but an adapter that plays a role has no weight",
                position,
            )
        return value
    if option.kind == "choice":
        if value not in option.choices:
            raise fail(f"one of {', '.join(option.choices)}")
        return str(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fail("a number")
    if option.kind == "int" and not isinstance(value, int):
        raise fail("a whole number")
    if not option.minimum <= value <= option.maximum or not math.isfinite(value):
        raise fail(f"{option.minimum:g} to {option.maximum:g}")
    return value if option.kind == "int" else float(value)


def check_arity(method: Method, options: Mapping[str, Value], terms: int, position: int | None) -> None:
    """RecipeError when an option without a default is missing, or the method does not take so many terms."""
    for option in method.options:
        if option.default is None and option.name not in options:
            raise RecipeError(f"method {method.name!r} needs the option {option.name!r}: {option.help}", position)
    least, most = method.terms
    if not least <= terms <= most:
        expected = str(least) if least == most else f"{least} to {most}"
        raise RecipeError(f"method {method.name!r} takes {expected} adapters, got {terms}", position)
