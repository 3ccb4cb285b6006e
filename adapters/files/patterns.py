"""The regular expressions of `rank_pattern` and `alpha_pattern`, read into items that `matcher` can match in linear
time. They come from strangers, so Python's `re`, which may take exponential time, never sees them.

pattern = option { "|" option }
option  = { "^" | "$" | piece [ "*" | "+" | "?" | "{" N "}" | "{" N "," [ N ] "}" ] [ "?" ] }
piece   = CHARACTER | "." | "\\d" | "\\w" | "\\s" | "\\" SIGN | "[" … "]" | "(" pattern ")" | "(?:" pattern ")"
        | "(?P<" NAME ">" pattern ")"

What is read has the meaning it has for `re`; look-around, references, flags and possessive repeats are not read.
"""

import re
import string
from dataclasses import dataclass

ALPHABET = string.ascii_letters + string.digits + "_.-"
"""The characters of module names."""
MAX_PATTERN, MAX_DEPTH, MAX_REPEAT = 1024, 32, 256
FORMS = r"names, '.', '\.', '\d', '[0-9]', '*', '+', '?', '{2}', '(a|b)', '^' and '$'"

_CLASSES = {"d": string.digits, "w": string.ascii_letters + string.digits + "_", "s": ""}
_REPEATS = ("*", "+", "?", "{")
_NAME = re.compile(r"P<[A-Za-z_]\w{0,63}>", re.ASCII)
_COUNT = re.compile(r"\{(?:([0-9]{1,4})|([0-9]{0,4}),([0-9]{0,4}))\}")


@dataclass(frozen=True, slots=True)
class Anchor:
    """The start, or the `end`, of the name."""

    end: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """A group: one of its options."""

    options: "tuple[tuple[Item, ...], ...]"


@dataclass(frozen=True, slots=True)
class Repeat:
    """`item` repeated `low` to `high` times; `high` is None when there is no upper limit."""

    item: "Item"
    low: int
    high: int | None


Item = str | Anchor | Choice | Repeat
"""A text is one character of a name: any of those it holds."""


def read_pattern(text: str) -> Choice:
    """The pattern as items; ValueError, with what is not read, for anything outside the grammar."""
    if len(text) > MAX_PATTERN:
        raise ValueError(f"it has {len(text)} characters: expected at most {MAX_PATTERN}")
    reader = _Reader(text)
    choice = reader.choice(0)
    if reader.at < len(text):
        raise ValueError("a ')' has no '('")
    return choice


class _Reader:
    """One pass over the text, by recursive descent; `at` is the offset of the next character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def choice(self, depth: int) -> Choice:
        """Options up to the end or a ')'."""
        if depth > MAX_DEPTH:
            raise ValueError(f"its groups are nested more than {MAX_DEPTH} deep")
        options = [self._option(depth)]
        while self._accept("|"):
            options.append(self._option(depth))
        return Choice(tuple(options))

    def _option(self, depth: int) -> tuple[Item, ...]:
        items: list[Item] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            item = self._piece(depth)
            if self.text[self.at : self.at + 1] in _REPEATS:
                if isinstance(item, Anchor):
                    raise ValueError("a repeat has nothing to repeat")
                item = self._repeat(item)
            items.append(item)
        return tuple(items)

    def _piece(self, depth: int) -> Item:
        sign = self.text[self.at]
        self.at += 1
        match sign:
            case "^" | "$":
                return Anchor(end=sign == "$")
            case ".":
                return ALPHABET
            case "\\":
                return self._escape()
            case "[":
                return self._set()
            case "(":
                return self._group(depth)
            case "*" | "+" | "?" | "{":
                raise ValueError(f"{sign!r} has nothing to repeat")
        return sign

    def _group(self, depth: int) -> Choice:
        if self._accept("?") and not self._accept(":"):
            name = _NAME.match(self.text, self.at)
            if name is None:
                raise ValueError(f"'(?{self.text[self.at : self.at + 1]}' is not supported")
            self.at = name.end()
        choice = self.choice(depth + 1)
        if not self._accept(")"):
            raise ValueError("a '(' has no ')'")
        return choice

    def _repeat(self, item: Item) -> Repeat:
        """`item` with the repeat that follows it."""
        low: int
        high: int | None
        if count := _COUNT.match(self.text, self.at):
            self.at = count.end()
            exact, first, last = count.groups()
            low = int(exact or first or 0)
            high = low if exact else int(last) if last else None
        elif self._accept("*"):
            low, high = 0, None
        elif self._accept("+"):
            low, high = 1, None
        elif self._accept("?"):
            low, high = 0, 1
        else:
            raise ValueError("a '{' begins no count")
        self._accept("?")  # as few as possible: which names match is the same
        if max(low, high or 0) > MAX_REPEAT or (high is not None and low > high):
            raise ValueError(f"a count is out of range: expected 0 to {MAX_REPEAT}, the lower first")
        if self.text[self.at : self.at + 1] in _REPEATS:
            raise ValueError(f"{self.text[self.at]!r} follows a repeat")
        return Repeat(item, low, high)

    def _escape(self) -> str:
        """The characters that the sign after a backslash stands for."""
        sign = self.text[self.at : self.at + 1]
        self.at += 1
        if sign.lower() in _CLASSES:
            inside = _CLASSES[sign.lower()]
            return inside if sign.islower() else _exclude(inside)
        if not sign or (sign.isascii() and sign.isalnum()):
            raise ValueError(f"'\\{sign}' is not supported")
        return sign

    def _set(self) -> str:
        """The characters of `[…]`, whose bracket has been read."""
        exclude, start, characters = self._accept("^"), self.at, ""
        while not (self.at > start and self._accept("]")):
            first = self._member()
            if self.text.startswith("-", self.at) and self.text[self.at + 1 : self.at + 2] not in ("", "]"):
                self.at += 1
                last = self._member()
                if len(first) != 1 or len(last) != 1 or first > last:
                    raise ValueError("a range in '[…]' has no order")
                characters += "".join(sign for sign in ALPHABET if first <= sign <= last)
            else:
                characters += first
        return _exclude(characters) if exclude else characters

    def _member(self) -> str:
        if self.at >= len(self.text):
            raise ValueError("a '[' has no ']'")
        sign = self.text[self.at]
        self.at += 1
        return self._escape() if sign == "\\" else sign

    def _accept(self, sign: str) -> bool:
        accepted = self.text.startswith(sign, self.at)
        self.at += len(sign) * accepted
        return accepted


def _exclude(characters: str) -> str:
    return "".join(sign for sign in ALPHABET if sign not in characters)
