"""The characters of a recipe's text: numbers, names, signs, blanks, and what is wrong with one in the wrong place."""

import re

from adapters.errors import RecipeError, quote
from adapters.recipes.names import PLAIN_PATTERN, QUOTES, check_name

# A dot before another dot belongs to the `..` of a range.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.(?!\.)[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_DIGIT_IN_FRONT = re.compile(r"[0-9][A-Za-z]|[^ \t\r\n][0-9]")
"""The sign before an error and the one at it, where a name may begin with a digit."""
_BLANK = " \t\r\n"


class Scanner:
    """One pass over the text; `at` is the offset of the next character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def skip(self) -> int:
        """Pass over blanks; returns `at`."""
        while self.peek() and self.peek() in _BLANK:
            self.at += 1
        return self.at

    def peek(self) -> str:
        """The next character, empty at the end."""
        return self.text[self.at : self.at + 1]

    def char_after(self, place: int) -> str:
        """The first character from `place` on that is no blank, empty at the end."""
        while place < len(self.text) and self.text[place] in _BLANK:
            place += 1
        return self.text[place : place + 1]

    def accept(self, sign: str) -> bool:
        """Pass over `sign` if it comes next."""
        self.skip()
        accepted = self.peek() == sign
        self.at += accepted
        return accepted

    def expect(self, sign: str, why: str | None = None) -> None:
        """Pass over `sign`; RecipeError when something else comes next."""
        if not self.accept(sign):
            raise self.unexpected(why or f"expected {sign!r}")

    def unexpected(self, expected: str) -> RecipeError:
        """The error for what comes next."""
        sign = self.peek()
        hint = ""
        if sign == "-":
            hint = "; to subtract, add a negative weight, as in '1*a + -0.4*b'"
        elif sign in tuple("/@:") or _DIGIT_IN_FRONT.fullmatch(self.text[max(0, self.at - 1) : self.at + 1]):
            hint = "; names with '/', '@', ':' or a digit in front are put in backquotes, as in '0.6*`org/adapter`'"
        return RecipeError(f"{expected}, found {repr(sign) if sign else 'the end'}{hint}", self.at)

    def called(self) -> str | None:
        """The word that comes next if a bracket follows it, as in `ties(`."""
        self.skip()
        word = _WORD.match(self.text, self.at)
        return word.group() if word is not None and self.char_after(word.end()) == "(" else None

    def number_text(self) -> str | None:
        """Pass over a number, if one comes next, and return it as it is written."""
        number = _NUMBER.match(self.text, self.at)
        if number is None:
            return None
        self.at = number.end()
        return number.group()

    def number(self) -> float:
        """A number."""
        self.skip()
        text = self.number_text()
        if text is None:
            raise self.unexpected("expected a number")
        return float(text) + 0.0  # no negative zero

    def span(self, example: str) -> tuple[float, float]:
        """Two numbers and `..` between them."""
        first = self.number()
        self.skip()
        if not self.text.startswith("..", self.at):
            raise self.unexpected(f"expected '..', as in {example!r}")
        self.at += 2
        return first, self.number()

    def whole(self, expected: str) -> int:
        """A whole number."""
        place = self.skip()
        text = self.number_text()
        if text is None:
            raise self.unexpected(f"expected {expected}")
        if _INTEGER.fullmatch(text) is None:
            raise RecipeError(f"expected {expected}, found {quote(text)}", place)
        return int(text)

    def value(self) -> float | int | str:
        """A number, whole if it is written so, or a name."""
        text = self.number_text()
        if text is None:
            return self.name()
        return int(text) if _INTEGER.fullmatch(text) else float(text)

    def name(self) -> str:
        """A name, in backquotes or double quotes or plain."""
        mark = self.peek()
        if not mark or mark not in QUOTES:
            return self.word()
        end = self.text.find(mark, self.at + 1)
        if end < 0:
            raise RecipeError(f"expected a second {mark} after the name that begins here", self.at)
        name = check_name(self.text[self.at + 1 : end], self.at)
        self.at = end + 1
        return name

    def word(self) -> str:
        """A plain name."""
        name = _WORD.match(self.text, self.at)
        if name is None:
            raise self.unexpected("expected a name")
        if PLAIN_PATTERN.fullmatch(name.group()) is None:
            message = f"{quote(name.group())} is too long: a name has at most 64 characters, or is put in backquotes"
            raise RecipeError(message, self.at)
        self.at = name.end()
        return name.group()
