"""Everything this package raises on purpose.

FusionError (a ValueError)
├── RecipeError          the recipe's text or JSON form is wrong; `position` says where
├── UnknownAdapterError  a recipe names an adapter nobody gave; `nearest` is the likely typo
├── AdapterError         an adapter cannot be used; `reason` is a short code
└── LossError            `strict` was asked for and the fusion would lose something
"""

import difflib
from collections.abc import Iterable
from itertools import islice

QUOTED = 120
COMPARED_NAMES, COMPARED_CHARACTERS = 1000, 100
"""Names a misspelled one is compared with, at most, and the length up to which names are compared at all."""


def quoted(value: object) -> str:
    """`value` as it may stand in a message: one line, at most QUOTED characters."""
    text = repr(value)
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 1]}…"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`, None when none is near; for long names and many, in bounded time."""
    if len(name) > COMPARED_CHARACTERS:
        return None
    compared = [other for other in islice(known, COMPARED_NAMES) if len(other) <= COMPARED_CHARACTERS]
    return next(iter(difflib.get_close_matches(name, compared, n=1)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The hint "did you mean 'task'?" for a name that is unknown; empty when no known name is near."""
    near = nearest(name, known)
    return "" if near is None else f"did you mean {near!r}?"


class FusionError(ValueError):
    """Base of every error of this package: the input is at fault, never the program."""


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
        super().__init__(f"unknown adapter {name!r}: {hint or 'no adapter is known yet'}")


class AdapterError(FusionError):
    """An adapter that cannot be fused as LoRA. `reason` is a short code such as 'dora' or 'nan'."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(f"{message} [{reason}]")


class LossError(FusionError):
    """`strict` refuses a fusion whose relative error is over the tolerance."""
