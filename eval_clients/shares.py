"""Shares and means with 95 % intervals: what a sample says about the true value."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Self

Z95 = 1.959964
"""Two-sided 95 % point of the normal distribution."""


@dataclass(frozen=True, slots=True)
class Share:
    """`hits` of `total`, with Wilson's 95 % interval (E. B. Wilson, JASA 22, 1927).

    `hits` is a fraction where a prompt was answered several times: it counts once, with the mean of its answers.
    """

    hits: float
    total: int
    low: float
    high: float

    @classmethod
    def from_counts(cls, hits: float, total: int) -> Self:
        """Wilson score interval, both ends in [0, 1]. ValueError unless 0 <= hits <= total and total >= 1."""
        if total < 1 or not 0 <= hits <= total:
            raise ValueError(f"expected 0 <= hits <= total and total >= 1, got {hits} of {total}")
        p, z2 = hits / total, Z95 * Z95
        center = (p + z2 / (2 * total)) / (1 + z2 / total)
        half = Z95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total * total)) / (1 + z2 / total)
        # At either end, rounding would leave the share outside its interval.
        low = 0.0 if hits == 0 else max(0.0, center - half)
        high = 1.0 if hits == total else min(1.0, center + half)
        return cls(int(hits) if hits == int(hits) else hits, total, low, high)

    @property
    def value(self) -> float:
        """`hits` / `total`, from 0 to 1."""
        return self.hits / self.total

    def __str__(self) -> str:
        value, low, high = (round(100 * x) for x in (self.value, self.low, self.high))
        return f"{value} % ({low}–{high})"


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean of judged scores, with the 95 % interval of the normal distribution."""

    value: float
    total: int
    low: float
    high: float

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Self:
        """The mean of one or more values; the interval of a single one is the value itself."""
        half = Z95 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return cls(fmean(values), len(values), fmean(values) - half, fmean(values) + half)

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}–{self.high:.2f})"
