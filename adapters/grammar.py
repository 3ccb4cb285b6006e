"""Reads the two forms of a recipe, text and JSON, into a checked `Recipe`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from .errors import RecipeError
from .methods import DEFAULT_METHOD, METHODS, Method, Option, Value
from .recipe import MAX_TERMS, MAX_TEXT, NAME_PATTERN, Recipe, Term, _short, check_name

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_LONG_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_BLANK = " \t\r\n"


class Parser:
    """One pass over the text, by recursive descent; `at` is the offset of the next character."""

    def __init__(self, text: str, max_weight: float) -> None:
        if not isinstance(text, str):
            raise RecipeError(f"a recipe is a text, got {_short(text)}", 0)
        if len(text) > MAX_TEXT:
            raise RecipeError(f"a recipe has at most {MAX_TEXT} characters, got {len(text)}", MAX_TEXT)
        self.text = text
        self.at = 0
        self.max_weight = max_weight

    def recipe(self) -> Recipe:
        """The whole text as one recipe."""
        start = self._skip()
        if start == len(self.text):
            raise RecipeError("the recipe is empty: expected for example '0.6*task + 0.4*safety'", start)
        name = _LONG_NAME.match(self.text, start)
        if name is not None and self._char_after(name.end()) == "(":
            recipe = self._call()
        else:
            recipe = Recipe(DEFAULT_METHOD, self._sum())
        if self._skip() < len(self.text):
            raise RecipeError(self._unexpected("expected '+' or the end of the recipe"), self.at)
        return recipe

    def _call(self) -> Recipe:
        start = self.at
        method = find_method(self._name(), start)
        self._expect("(")
        terms = self._sum()
        options: dict[str, Value] = {}
        while self._accept(","):
            place = self._skip()
            option = find_option(method, self._name(), place)
            if option.name in options:
                raise RecipeError(f"option {option.name!r} is given twice: keep one", place)
            self._expect("=")
            place = self._skip()
            options[option.name] = check_option(option, self._value(), terms, place)
        closing = self._skip()
        if not self._accept(")"):
            raise RecipeError(self._unexpected("expected '+', ',' or ')'"), closing)
        require_options(method, options, closing)
        return Recipe(method.name, terms, tuple(options.items()))

    def _sum(self) -> tuple[Term, ...]:
        terms: dict[str, Term] = {}
        while True:
            place = self._skip()
            weight, name, name_at = self._term()
            add_term(terms, name, weight, self.max_weight, weight_at=place, name_at=name_at)
            if not self._accept("+"):
                return tuple(terms.values())

    def _term(self) -> tuple[float, str, int]:
        number = _NUMBER.match(self.text, self.at)
        if number is None and self._peek() in "+-" and self._peek():
            raise RecipeError(self._unexpected("expected digits after the sign, as in '-1*task'"), self.at)
        if number is not None:
            self.at = number.end()
            self._expect("*", f"expected '*' between the weight {number.group()} and an adapter's name")
        name_at = self._skip()
        name = self._name()
        after = self._char_after(self.at)
        if after == "(":
            raise RecipeError(f"{name!r} is called inside a recipe: methods do not nest", name_at)
        if after == "*":
            self._skip()
            hint = f"expected a decimal weight before '*', found {name!r}"
            raise RecipeError(f"{hint}; terms are joined by '+', as in '1*a + -0.4*b'", name_at)
        return (1.0 if number is None else float(number.group())), name, name_at

    def _value(self) -> Value:
        number = _NUMBER.match(self.text, self.at)
        if number is None:
            return self._name()
        self.at = number.end()
        text = number.group()
        return int(text) if _INTEGER.fullmatch(text) else float(text)

    def _name(self) -> str:
        found = _LONG_NAME.match(self.text, self.at)
        if found is None:
            raise RecipeError(self._unexpected("expected a name"), self.at)
        if NAME_PATTERN.fullmatch(found.group()) is None:
            raise RecipeError(f"{_short(found.group())} is too long: a name has at most 64 characters", self.at)
        self.at = found.end()
        return found.group()

    def _skip(self) -> int:
        while self._peek() and self._peek() in _BLANK:
            self.at += 1
        return self.at

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _char_after(self, place: int) -> str:
        while place < len(self.text) and self.text[place] in _BLANK:
            place += 1
        return self.text[place : place + 1]

    def _accept(self, sign: str) -> bool:
        self._skip()
        found = self._peek() == sign
        self.at += found
        return found

    def _expect(self, sign: str, why: str | None = None) -> None:
        if not self._accept(sign):
            raise RecipeError(self._unexpected(why or f"expected {sign!r}"), self.at)

    def _unexpected(self, expected: str) -> str:
        found = f"found {self._peek()!r}" if self._peek() else "found the end"
        if self._peek() == "-":
            found += "; to subtract, add a negative weight, as in '1*a + -0.4*b'"
        return f"{expected}, {found}"


def read_json(obj: object, max_weight: float) -> Recipe:
    """The JSON form as a recipe; see `recipe.from_json`."""
    if not isinstance(obj, Mapping):
        raise RecipeError(f'a fusion in JSON form is an object like {{"adapters": […]}}, got {_short(obj)}')
    entries = obj.get("adapters")
    if not isinstance(entries, list | tuple) or not entries:
        raise RecipeError(f"'adapters' must be a list with at least one entry, got {_short(entries)}")
    terms: dict[str, Term] = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or "name" not in entry or not set(entry) <= {"name", "weight"}:
            raise RecipeError(f"'adapters[{index}]' must be {{name, weight}}, got {_short(entry)}")
        name, weight = entry["name"], entry.get("weight", 1.0)
        if not isinstance(name, str):
            raise RecipeError(f"'adapters[{index}].name' must be a text, got {_short(name)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise RecipeError(f"'adapters[{index}].weight' must be a number, got {_short(weight)}")
        add_term(terms, name, weight, max_weight)
    method_name = obj.get("method", DEFAULT_METHOD)
    method = find_method(method_name, None)
    options: dict[str, Value] = {}
    for key, value in obj.items():
        if key not in ("adapters", "method"):
            option = find_option(method, key, None)
            options[option.name] = check_option(option, value, tuple(terms.values()), None)
    require_options(method, options, None)
    return Recipe(method.name, tuple(terms.values()), tuple(options.items()))


def add_term(
    terms: dict[str, Term],
    name: str,
    weight: float,
    max_weight: float,
    *,
    weight_at: int | None = None,
    name_at: int | None = None,
) -> None:
    """Check one term and add it to `terms`."""
    check_name(name, name_at)
    if name in terms:
        raise RecipeError(f"adapter {name!r} appears twice: add its weights up into one term", name_at)
    if not abs(weight) <= max_weight or not math.isfinite(weight):
        raise RecipeError(
            f"the weight {_short(weight)} of {name!r} is out of range: expected |weight| <= {max_weight:g}",
            weight_at,
        )
    if len(terms) >= MAX_TERMS:
        raise RecipeError(f"a recipe has at most {MAX_TERMS} adapters", name_at)
    terms[name] = Term(name, float(weight))


def find_method(name: object, position: int | None) -> Method:
    """The row of that name; RecipeError naming the known ones."""
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        raise RecipeError(f"unknown method {_short(name)}: known methods are {', '.join(METHODS)}", position)
    return method


def find_option(method: Method, name: object, position: int | None) -> Option:
    """The method's option of that name; RecipeError naming those it has."""
    for option in method.options:
        if option.name == name:
            return option
    known = ", ".join(option.name for option in method.options) or "none"
    raise RecipeError(f"method {method.name!r} has no option {_short(name)}: its options are {known}", position)


def check_option(option: Option, value: object, terms: tuple[Term, ...], position: int | None) -> Value:
    """`value` as the option's kind and within its bounds, or RecipeError."""
    wrong = f"option {option.name!r} = {_short(value)}"
    if option.kind == "adapter":
        if not isinstance(value, str) or value not in {term.adapter for term in terms}:
            raise RecipeError(f"{wrong}: expected the name of one of the recipe's adapters", position)
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f"{wrong}: expected a number", position)
    if option.kind == "int" and not isinstance(value, int):
        raise RecipeError(f"{wrong}: expected a whole number", position)
    if not option.minimum <= value <= option.maximum or not math.isfinite(value):
        raise RecipeError(f"{wrong}: expected {option.minimum:g} to {option.maximum:g}", position)
    return value if option.kind == "int" else float(value)


def require_options(method: Method, options: Mapping[str, Value], position: int | None) -> None:
    """RecipeError when an option without a default was not given."""
    for option in method.options:
        if option.default is None and option.name not in options:
            raise RecipeError(f"method {method.name!r} needs the option {option.name!r}: {option.help}", position)
