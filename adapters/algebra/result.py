"""The outcome of a fusion in one module."""

from dataclasses import dataclass, replace
from typing import Self

from adapters.algebra.lowrank import FactorPair, Truncation
from adapters.algebra.similarity import ParentSimilarity


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """One module's ranks, the energy lost, how its parents compare, and its factors unless only planned.

    `kept_energy` and `lost_energy` are squared norms of the update (the first is set only where some may be lost).
    Methods that merge factor by factor set `departure`, the squared distance from the exact weighted sum, and
    `reference`, the squared norm of that sum.
    """

    rank_before: int
    rank: int
    similarity: ParentSimilarity
    factors: FactorPair | None = None
    kept_energy: float = 0.0
    lost_energy: float = 0.0
    departure: float = 0.0
    reference: float = 0.0

    def apply(self, truncation: Truncation) -> Self:
        """The result after its update was truncated."""
        t = truncation
        return replace(self, rank=t.rank, kept_energy=t.kept_energy, lost_energy=t.lost_energy, factors=t.factors)
