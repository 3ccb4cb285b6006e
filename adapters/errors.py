"""Everything this package raises on purpose.

FusionError (a ValueError)
├── RecipeError          the recipe's text or JSON form is wrong; `position` says where
├── UnknownAdapterError  a recipe names an adapter that is not known; `nearest` is the likely one
├── AdapterError         an adapter cannot be used; `reason` is a short code
└── LossError            `strict` was asked for and the fusion would lose something
"""

import difflib
from collections.abc import Iterable
from itertools import islice

MAX_QUOTED = 120
MAX_CANDIDATES, MAX_COMPARED_CHARS = 1000, 100
"""How many names a misspelled one is compared with, and the length up to which names are compared at all."""


def quote(value: object) -> str:
    """`value` for a message: one line, at most MAX_QUOTED characters."""
    text = repr(value)
    return text if len(text) <= MAX_QUOTED else f"{text[: MAX_QUOTED - 1]}…"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, None when none is near; in bounded time, however many and long they are."""
    if len(name) > MAX_COMPARED_CHARS:
        return None
    candidates = [other for other in islice(known, MAX_CANDIDATES) if len(other) <= MAX_COMPARED_CHARS]
    return next(iter(difflib.get_close_matches(name, candidates, n=1)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The clause "did you mean 'task'?", to follow ": " after an unknown name; empty when no known name is near."""
    near = nearest(name, known)
    return "" if near is None else f"did you mean {near!r}?"


class FusionError(ValueError):
    """Base of every error this package raises on purpose: the input is at fault, never the program."""


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
        hint = did_you_mean(name, names)
        if not hint and names:
            hint = f"known adapters: {', '.join(names[:20])}{', …' if len(names) > 20 else ''}"
        super().__init__(f"unknown adapter {name!r}: {hint or 'no adapters are registered or given'}")


class AdapterError(FusionError):
    """An adapter that cannot be fused as LoRA. `reason` is a short code such as 'dora' or 'nan'."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(f"{message} [{reason}]")


class LossError(FusionError):
    """`strict` refuses a fusion whose relative error is over the tolerance."""
