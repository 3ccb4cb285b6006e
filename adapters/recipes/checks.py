"""What both forms of a recipe, text and JSON, must fulfill: terms, methods, options."""

import math
from collections.abc import Collection, Mapping

from adapters.errors import RecipeError, clip, did_you_mean, quote
from adapters.recipes.gates import Bounds, Gate
from adapters.recipes.method import Method, Option, Value
from adapters.recipes.methods import METHODS
from adapters.recipes.names import check_name
from adapters.recipes.weights import Weight, list_numbers, number_text

MAX_TERMS = 64
MAX_WEIGHT = 16.0


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
    for number in list_numbers(weight):
        if not is_weight(number, max_weight):
            raise RecipeError(
                f"the weight {quote(number)} of {name!r} is out of range: expected |weight| <= {max_weight:g}",
                weight_at,
            )
    if len(weights) >= MAX_TERMS:
        raise RecipeError(f"a recipe has at most {MAX_TERMS} adapters", name_at)
    weights[name] = weight


def is_weight(number: float, max_weight: float) -> bool:
    """Whether the number may be a weight."""
    return abs(number) <= max_weight and math.isfinite(number)


def check_gate_name(name: str, weights: Mapping[str, Weight], position: int | None) -> str:
    """`name` if a gate may be called that beside these terms."""
    if check_name(name, position) in weights:
        raise RecipeError(f"the gate {name!r} is a term already: expected the name of a gate", position)
    return name


def add_bounds(
    bounds: dict[str, Bounds],
    name: str,
    span: Bounds,
    weights: Mapping[str, Weight],
    max_weight: float,
    position: int | None,
) -> None:
    """Check the bounds of one adapter's weight, whose default is in `weights`, and add them to `bounds`."""
    low, high = span
    text = f"{name} in {number_text(low)}..{number_text(high)}"
    if name not in weights:
        hint = did_you_mean(str(name), weights) or clip(f"the terms are {', '.join(weights)}")
        raise RecipeError(f"{quote(text)} names no term of the recipe: {hint}", position)
    if name in bounds:
        raise RecipeError(f"{name!r} has bounds twice: keep one", position)
    if not all(is_weight(number, max_weight) for number in span):
        raise RecipeError(f"{quote(text)} is out of range: expected |weight| <= {max_weight:g}", position)
    if low > high:
        raise RecipeError(f"{quote(text)} is the wrong way round: expected LOW..HIGH", position)
    default = weights[name]
    if not isinstance(default, float):
        raise RecipeError(f"{quote(text)}: a gate chooses a number, but the weight of {name!r} is a function", position)
    if not low <= default <= high:
        raise RecipeError(
            f"{quote(text)} does not contain {number_text(default)}, the weight when the gate fails: widen the bounds "
            "or change the weight",
            position,
        )
    bounds[name] = span


def check_gate(by: str | None, bounds: Mapping[str, Bounds], position: int | None) -> Gate:
    """The gate; RecipeError when it has no name or nothing to choose."""
    if by is None:
        raise RecipeError("a gate needs 'by=NAME', the gate that chooses", position)
    if not bounds:
        raise RecipeError("a gate has nothing to choose: expected bounds, as in 'safety in 0..0.8'", position)
    return Gate(by, tuple(bounds.items()))


def find_method(name: object, position: int | None, others: Collection[str] = ()) -> Method:
    """The row of that name; RecipeError naming the known ones, and `others` that stand in the same place."""
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        known = (*METHODS, *others)
        hint = (did_you_mean(name, known) if isinstance(name, str) else "") or f"known methods are {', '.join(known)}"
        raise RecipeError(f"unknown method {quote(name)}: {hint}", position)
    return method


def find_option(method: Method, name: object, position: int | None, others: Collection[str] = ()) -> Option:
    """The method's option of that name; RecipeError naming those it has, or one of `others` in the same place."""
    for option in method.options:
        if option.name == name:
            return option
    hint = (
        did_you_mean(name, (*method.kinds, *others)) if isinstance(name, str) else ""
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
