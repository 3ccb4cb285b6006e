"""The JSON form of a weight: a number, a function's name with a list, or patterns with what is in their modules.

0.6   {"ramp": [0.2, 0.6]}   {"steps": [["prompt", 0.4], [0, 1], [4, 0.2]]}   {"fade": [1, 0.2, 8]}
{"components": [1, 0.5]}   {"*.mlp.*": {"fade": [1, 0.2, 8]}, "*": 0.6}
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from adapters.errors import RecipeError, quote
from adapters.recipes import weight_checks as checks
from adapters.recipes.weight_parser import PATTERN
from adapters.recipes.weights import PROMPT, ByModule, Components, Course, Fade, Level, Ramp, Steps, Weight


def read_number(value: object, where: str) -> float:
    """A number, infinite if it is out of all bounds; RecipeError naming `where` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f"{where!r} must be a number, got {quote(value)}")
    return math.inf if abs(value) >= 1e300 else float(value) + 0.0


def read_weight(value: object, where: str) -> Weight:
    """Any weight; RecipeError naming `where` for what is none."""
    try:
        return _read_weight(value, where)
    except RecipeError as error:
        message = str(error)
        raise RecipeError(message if message.startswith(repr(where)) else f"{where!r}: {message}") from error


def _read_weight(value: object, where: str) -> Weight:
    if not isinstance(value, Mapping):
        return read_number(value, where)
    if isinstance(items := value.get("components"), list | tuple) and len(value) == 1:
        return _read_components(items, where)
    if isinstance(value.get("components"), list | tuple) or _find_function(value) is not None:
        return _read_course(value, where)
    rules: dict[str, Course] = {}
    for pattern, weight in value.items():
        if not isinstance(pattern, str) or PATTERN.fullmatch(pattern) is None:
            raise RecipeError(f"{where!r} has {quote(pattern)}: expected a pattern of module names, as in '*.mlp.*'")
        checks.add_rule(rules, pattern, _read_course(weight, where), None)
    if not rules:
        raise RecipeError(f"{where!r} is empty: expected a number or patterns of module names")
    return ByModule(tuple(rules.items()))


def _find_function(value: Mapping[object, object]) -> str | None:
    """The function that an object is about: its name has a list, where a pattern has a number or an object."""
    return next((name for name in _FUNCTIONS if isinstance(value.get(name), list | tuple)), None)


def _read_course(value: object, where: str) -> Course:
    if not isinstance(value, Mapping):
        return read_number(value, where)
    name = _find_function(value)
    if name is None or len(value) != 1:
        raise RecipeError(f"{where!r} must be a number or one of {_EXPECTED}, got {quote(value)}")
    return _FUNCTIONS[name](value[name], where)


def _read_components(items: list[object] | tuple[object, ...], where: str) -> Components:
    numbers: list[float] = []
    for number in items:
        checks.add_component(numbers, read_number(number, where), None)
    if not numbers:
        raise RecipeError(f"{where!r} has no components: expected one number for each")
    return Components(tuple(numbers))


def _read_ramp(items: list[object] | tuple[object, ...], where: str) -> Ramp:
    if len(items) != 2:
        raise RecipeError(f'{where!r} must be {{"ramp": [first, last]}}, got {quote(items)}')
    return Ramp(read_number(items[0], where), read_number(items[1], where))


def _read_fade(items: list[object] | tuple[object, ...], where: str) -> Fade:
    if len(items) != 3 or isinstance(items[2], bool) or not isinstance(items[2], int):
        raise RecipeError(f'{where!r} must be {{"fade": [first, last, tokens]}}, got {quote(items)}')
    first, last = read_number(items[0], where), read_number(items[1], where)
    return Fade(first, last, checks.check_tokens(items[2], None))


def _read_steps(items: list[object] | tuple[object, ...], where: str) -> Steps:
    rules: dict[int, Level] = {}
    for item in items:
        if not isinstance(item, list | tuple) or len(item) != 2:
            raise RecipeError(f'{where!r} must be {{"steps": [[start, weight], …]}}, got {quote(item)}')
        start, level = item[0], _read_course(item[1], where)
        if start == "prompt":
            start = PROMPT
        elif isinstance(start, bool) or not isinstance(start, int):
            raise RecipeError(f"{where!r} has a step at {quote(start)}: expected 'prompt' or a token's number")
        else:
            checks.check_start(start, None)
        if isinstance(level, Steps | Fade):
            raise RecipeError(f"{where!r} has {quote(item[1])} inside steps: expected a number or a ramp")
        checks.add_step(rules, start, level, None)
    if not rules:
        raise RecipeError(f"{where!r} has no steps: expected [start, weight] for each")
    return Steps(tuple(rules.items()))


_FUNCTIONS: Mapping[str, Callable[[Any, str], Course]] = {"ramp": _read_ramp, "steps": _read_steps, "fade": _read_fade}
_EXPECTED = '{"ramp": […]}, {"steps": […]}, {"fade": […]}'
