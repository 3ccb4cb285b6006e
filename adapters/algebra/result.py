"""What becomes of one module in a fusion."""

from dataclasses import dataclass, replace
from typing import Self

from adapters.algebra.lowrank import FactorPair, Truncation
from adapters.algebra.similarity import ParentSimilarity


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """One module's ranks, what was lost, how its parents compare, and its factors unless only planned.

    `kept` and `lost` are squared norms of the update (`kept` only where something may be lost). Methods that merge
    factor by factor set `departure`, the squared distance from the exact weighted sum, and `reference`, the squared
    norm of that sum.
    """

    rank_before: int
    rank: int
    similarity: ParentSimilarity
    factors: FactorPair | None = None
    kept: float = 0.0
    lost: float = 0.0
    departure: float = 0.0
    reference: float = 0.0

    def apply(self, truncation: Truncation) -> Self:
        """The result after its update was truncated."""
        t = truncation
        return replace(self, rank=t.rank, kept=t.kept, lost=t.lost, factors=t.factors)
