"""The text of a recipe.

recipe = sum | METHOD "(" sum { "," option } ")"
sum    = term { "+" term }
term   = [ weight "*" ] name
weight = NUMBER | "ramp" "(" NUMBER ".." NUMBER ")" | "{" PATTERN ":" NUMBER { "," PATTERN ":" NUMBER } "}"
option = NAME "=" ( NUMBER | name )
name   = NAME | "`" ANY_NAME "`" | '"' ANY_NAME '"'

NAME is what `PLAIN_PATTERN` matches, ANY_NAME what `check_name` takes.
"""

import re
from itertools import starmap

from adapters.errors import RecipeError, clip, quote
from adapters.recipes import checks
from adapters.recipes.method import Value
from adapters.recipes.methods import DEFAULT_METHOD
from adapters.recipes.names import PLAIN_PATTERN, QUOTES, check_name
from adapters.recipes.recipe import Recipe, Term
from adapters.recipes.weights import ByModule, Ramp, Schedule, Weight

MAX_TEXT = 8192

# A dot before another dot belongs to the `..` of a ramp.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.(?!\.)[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_LONG_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
PATTERN = re.compile(r"[A-Za-z0-9_.*?-]{1,128}")
_BLANK = " \t\r\n"
RAMP = "ramp"


def parse(text: str, *, max_weight: float = checks.MAX_WEIGHT) -> Recipe:
    """Read a recipe's text; RecipeError, with the position, for anything outside the grammar or the bounds."""
    return check_length(_Parser(text, max_weight).recipe())


def check_length(recipe: Recipe) -> Recipe:
    """The recipe; RecipeError unless its canonical text can be read back."""
    if (length := len(recipe.format())) > MAX_TEXT:
        raise RecipeError(f"a recipe has at most {MAX_TEXT} characters in canonical form, got {length}")
    return recipe


class _Parser:
    """One pass over the text, by recursive descent; `at` is the offset of the next character."""

    def __init__(self, text: str, max_weight: float) -> None:
        if not isinstance(text, str):
            raise RecipeError(f"a recipe must be a string, got {quote(text)}", 0)
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
        if name is not None and name.group() != RAMP and self._char_after(name.end()) == "(":
            recipe = self._call()
        else:
            recipe = Recipe(DEFAULT_METHOD, tuple(starmap(Term, self._sum().items())))
        if self._skip() < len(self.text):
            raise RecipeError(self._unexpected("expected '+' or the end of the recipe"), self.at)
        return recipe

    def _call(self) -> Recipe:
        start = self.at
        method = checks.find_method(self._word(), start)
        self._expect("(")
        weights = self._sum()
        options: dict[str, Value] = {}
        while self._accept(","):
            place = self._skip()
            option = checks.find_option(method, self._word(), place)
            if option.name in options:
                raise RecipeError(f"option {option.name!r} is given twice: keep one", place)
            self._expect("=")
            place = self._skip()
            options[option.name] = checks.check_option(option, self._value(), weights, place)
        closing = self._skip()
        if not self._accept(")"):
            raise RecipeError(self._unexpected("expected '+', ',' or ')'"), closing)
        checks.check_arity(method, options, len(weights), closing)
        return Recipe(method.name, tuple(starmap(Term, weights.items())), tuple(options.items()))

    def _sum(self) -> dict[str, Weight]:
        weights: dict[str, Weight] = {}
        while True:
            place = self._skip()
            weight, name, name_at = self._term()
            checks.add_term(weights, name, weight, self.max_weight, weight_at=place, name_at=name_at)
            if not self._accept("+"):
                return weights

    def _term(self) -> tuple[Weight, str, int]:
        schedule = self._schedule()
        if schedule is not None:
            self._expect("*", f"expected '*' between {clip(str(schedule))} and an adapter's name")
            name_at = self._skip()
            return schedule, self._name(), name_at
        number = _NUMBER.match(self.text, self.at)
        if number is None and self._peek() in "+-" and self._peek():
            raise RecipeError(self._unexpected("expected digits after the sign, as in '-1*task'"), self.at)
        if number is not None:
            self.at = number.end()
            self._expect("*", f"expected '*' between the weight {clip(number.group())} and an adapter's name")
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

    def _schedule(self) -> Schedule | None:
        """`ramp(a..b)` or `{pattern: weight, …}` when one begins here."""
        name = _LONG_NAME.match(self.text, self.at)
        if name is not None and name.group() == RAMP and self._char_after(name.end()) == "(":
            self.at = name.end()
            self._expect("(")
            first = self._number()
            self._skip()
            if not self.text.startswith("..", self.at):
                raise RecipeError(self._unexpected("expected '..', as in 'ramp(0.2..0.6)'"), self.at)
            self.at += 2
            last = self._number()
            self._expect(")")
            return Ramp(first, last)
        if not self._accept("{"):
            return None
        rules: dict[str, float] = {}
        while True:
            place = self._skip()
            pattern = PATTERN.match(self.text, self.at)
            if pattern is None:
                raise RecipeError(self._unexpected("expected a pattern of module names, as in '*.mlp.*'"), self.at)
            self.at = pattern.end()
            self._expect(":")
            checks.add_rule(rules, pattern.group(), self._number(), place)
            if not self._accept(","):
                self._expect("}", "expected ',' or '}'")
                return ByModule(tuple(rules.items()))

    def _number(self) -> float:
        self._skip()
        number = _NUMBER.match(self.text, self.at)
        if number is None:
            raise RecipeError(self._unexpected("expected a number"), self.at)
        self.at = number.end()
        return float(number.group())

    def _value(self) -> Value:
        number = _NUMBER.match(self.text, self.at)
        if number is None:
            return self._name()
        self.at = number.end()
        text = number.group()
        return int(text) if _INTEGER.fullmatch(text) else float(text)

    def _name(self) -> str:
        mark = self._peek()
        if not mark or mark not in QUOTES:
            return self._word()
        end = self.text.find(mark, self.at + 1)
        if end < 0:
            raise RecipeError(f"expected a second {mark} after the name that begins here", self.at)
        name = check_name(self.text[self.at + 1 : end], self.at)
        self.at = end + 1
        return name

    def _word(self) -> str:
        name = _LONG_NAME.match(self.text, self.at)
        if name is None:
            raise RecipeError(self._unexpected("expected a name"), self.at)
        if PLAIN_PATTERN.fullmatch(name.group()) is None:
            message = f"{quote(name.group())} is too long: a name has at most 64 characters, or is put in backquotes"
            raise RecipeError(message, self.at)
        self.at = name.end()
        return name.group()

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
        accepted = self._peek() == sign
        self.at += accepted
        return accepted

    def _expect(self, sign: str, why: str | None = None) -> None:
        if not self._accept(sign):
            raise RecipeError(self._unexpected(why or f"expected {sign!r}"), self.at)

    def _unexpected(self, expected: str) -> str:
        sign = self._peek()
        hint = ""
        if sign == "-":
            hint = "; to subtract, add a negative weight, as in '1*a + -0.4*b'"
        elif sign in tuple("/@:") or (sign.isalnum() and self.text[self.at - 1 : self.at] not in _BLANK):
            hint = "; names with '/', '@', ':' or a digit in front are put in backquotes, as in '0.6*`org/adapter`'"
        return f"{expected}, found {repr(sign) if sign else 'the end'}{hint}"
