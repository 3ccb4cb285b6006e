"""Everything this package raises on purpose.

FusionError (a ValueError)
├── RecipeError          the recipe's text or JSON form is wrong; `position` says where
├── UnknownAdapterError  a recipe names an adapter that is not known; `nearest` is the likely one
├── AdapterError         an adapter cannot be used; `reason` is a short code
└── LossError            `strict` was asked for and the fusion would lose something
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

MAX_QUOTED = 120
MAX_LEVELS, MAX_DIGITS = 4, 400
"""How deep into lists and objects a quoted value is shown, and how long its numbers may be."""
MAX_CANDIDATES, MAX_COMPARED_CHARS = 64, 128
"""How many names a misspelled one is compared with, and the length up to which names are compared at all."""
NEAR = 0.65
"""The share of characters in common from which a known name is near."""


def quote(value: object) -> str:
    """`value` for a message: one line, at most MAX_QUOTED characters, in a time that does not grow with the value."""
    return clip(repr(_cut(value)))


def clip(text: str) -> str:
    """`text` for a message, at most MAX_QUOTED characters."""
    return text if len(text) <= MAX_QUOTED else f"{text[: MAX_QUOTED - 1]}…"


def _cut(value: object, levels: int = MAX_LEVELS) -> object:
    """As much of a value of JSON as MAX_QUOTED characters can show; objects of other types as they are."""
    match value:
        case str() | bytes():
            return value[:MAX_QUOTED]
        case bool():
            return value
        case int() if value.bit_length() > 4 * MAX_DIGITS:
            return f"a number of {value.bit_length()} bits"
        case list() | tuple() | Mapping() if not levels:
            return "…"
        case list():
            return [_cut(item, levels - 1) for item in islice(value, MAX_QUOTED // 3 + 1)]
        case tuple():
            return tuple(_cut(item, levels - 1) for item in islice(value, MAX_QUOTED // 3 + 1))
        case Mapping():
            return {str(_cut(key)): _cut(item, levels - 1) for key, item in islice(value.items(), MAX_QUOTED // 6 + 1)}
    return value


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, None when none is near.

    Of many names only those beside its place in the alphabet are compared, so thousands take about a millisecond.
    """
    if len(name) > MAX_COMPARED_CHARS:
        return None
    names = [other for other in islice(known, 2**16) if len(other) <= MAX_COMPARED_CHARS]
    if len(names) > MAX_CANDIDATES:
        names.sort()
        start = max(0, bisect_left(names, name) - MAX_CANDIDATES // 2)
        names = names[start : start + MAX_CANDIDATES]
    share, near = max(((_similarity(name, other), other) for other in names), default=(0.0, ""))
    return near if share >= NEAR else None


def _similarity(name: str, other: str) -> float:
    """2·LCS / (both lengths), LCS being the length of the longest common subsequence.

    The algorithm of Hyyrö 2004, "Bit-parallel LCS-length computation revisited": one step for each character of
    `other`, on numbers with a bit for each character of `name`.
    """
    places: dict[str, int] = {}
    for index, character in enumerate(name):
        places[character] = places.get(character, 0) | 1 << index
    row = full = (1 << len(name)) - 1
    for character in other:
        common = row & places.get(character, 0)
        row = (row + common) | (row - common)
    return 2 * (len(name) - (row & full).bit_count()) / max(1, len(name) + len(other))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The clause "did you mean 'task'?", to follow ": " after an unknown name; empty when no known name is near."""
    near = nearest(name, known)
    return "" if near is None else f"did you mean {near!r}?"


class FusionError(ValueError):
    """Base of every error this package raises on purpose: the input is at fault, never the program."""

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, which would call `__init__` with the message alone."""
        return _restore, (type(self), *self.args), self.__dict__


def _restore(kind: type[FusionError], *args: object) -> FusionError:
    return kind.__new__(kind, *args)


class RecipeError(FusionError):
    """A malformed recipe. `position` is the 0-based offset into the text, None for the JSON form."""

    def __init__(self, message: str, position: int | None = None) -> None:
        self.position = position
        super().__init__(message if position is None else f"{message} (at position {position})")


class UnknownAdapterError(FusionError):
    """A recipe names an adapter that is not among the known ones."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        self.name = name
        self.nearest = nearest(name, names)
        hint = "no adapters are registered or given"
        if self.nearest is not None:
            hint = f"did you mean {self.nearest!r}?"
        elif names:
            hint = f"known adapters: {', '.join(names[:20])}{', …' if len(names) > 20 else ''}"
        super().__init__(f"unknown adapter {quote(name)}: {hint}")


class AdapterError(FusionError):
    """An adapter that cannot be fused as LoRA. `reason` is a short code such as 'dora' or 'nan'."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(f"{message} [{reason}]")


class LossError(FusionError):
    """`strict` refuses a fusion whose relative error is over the tolerance."""
