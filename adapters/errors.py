"""Everything this package raises on purpose.

FusionError (a ValueError)
├── RecipeError          the recipe's text or JSON form is wrong; `position` says where
├── UnknownAdapterError  a recipe names an adapter nobody gave; `nearest` is the likely typo
├── AdapterError         an adapter cannot be used; `reason` is a short code
└── LossError            `strict` was asked for and the fusion would lose something
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

QUOTED = 120


def quoted(value: object) -> str:
    """`value` as it may stand in a message: one line, at most QUOTED characters."""
    text = repr(value)
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 1]}…"


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
        close = difflib.get_close_matches(name, names, n=1)
        self.name = name
        self.nearest: str | None = close[0] if close else None
        if self.nearest is not None:
            hint = f"did you mean {self.nearest!r}?"
        elif names:
            hint = f"known adapters: {', '.join(names[:20])}{', …' if len(names) > 20 else ''}"
        else:
            hint = "no adapter is known yet: register one first"
        super().__init__(f"unknown adapter {name!r}: {hint}")


class AdapterError(FusionError):
    """An adapter that cannot be fused as LoRA. `reason` is a short code such as 'dora' or 'nan'."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(f"{message} [{reason}]")


class LossError(FusionError):
    """`strict` refuses a fusion whose relative error is over the tolerance."""
