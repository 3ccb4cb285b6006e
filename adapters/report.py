"""What a recipe costs in fidelity."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One module: ranks, share of the squared norm kept, relative Frobenius error."""

    module: str
    rank_before: int
    rank_after: int
    energy: float
    error: float


@dataclass(frozen=True, slots=True)
class FusionReport:
    """A whole fusion; `error` and `energy` are over all modules together, `bytes` those of the factors."""

    recipe: str
    method: str
    rank: int
    error: float
    energy: float
    exact: bool
    bytes: int
    modules: tuple[ModuleReport, ...]

    @property
    def verdict(self) -> str:
        """One line."""
        if self.exact:
            return f"exact at rank {self.rank}"
        if self.error < 1e-6:
            return f"exact to rounding at rank {self.rank} (error {self.error:.1e})"
        return f"rank {self.rank} keeps {self.energy:.2%} of the energy, relative error {self.error:.2e}"

    def to_json(self) -> dict[str, Any]:
        """JSON form, the verdict included."""
        return asdict(self) | {"modules": [asdict(m) for m in self.modules], "verdict": self.verdict}

    def table(self) -> str:
        """A readable table, a line a module."""
        width = max(len(m.module) for m in self.modules)
        lines = [f"{self.recipe}: {self.verdict}, {self.bytes / 1e6:.2f} MB"]
        lines.append(f"{'module':<{width}}  rank before  after   energy     error")
        lines += [
            f"{m.module:<{width}}  {m.rank_before:>11}  {m.rank_after:>5}  {m.energy:>7.3%}  {m.error:.2e}"
            for m in self.modules
        ]
        return "\n".join(lines)
