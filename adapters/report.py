"""What a recipe costs in fidelity: rank, energy kept, relative error, per module and overall."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One module: its rank before and after, the share of ‖ΔW‖² kept, the relative Frobenius error."""

    module: str
    rank_before: int
    rank_after: int
    energy: float
    error: float


@dataclass(frozen=True, slots=True)
class FusionReport:
    """A whole fusion.

    `error` is ‖ΔW − ΔW′‖ / ‖ΔW‖ over all modules (Frobenius), `energy` is 1 − error². Both count
    what truncation loses, not the rounding into the adapters' dtype. `exact` means that nothing was
    lost; `rank` is the largest of any module; `bytes` those of the factors.
    """

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
        """One line for people."""
        if self.exact:
            return f"exact at rank {self.rank}"
        return f"rank {self.rank} keeps {self.energy:.2%} of the energy, relative error {self.error:.3g}"

    def to_json(self) -> dict[str, object]:
        """All fields and the verdict, in JSON types."""
        return {**asdict(self), "modules": [asdict(row) for row in self.modules], "verdict": self.verdict}

    def table(self) -> str:
        """The recipe, the verdict and one line per module."""
        width = max(len("module"), *(len(row.module) for row in self.modules))
        lines = [
            self.recipe,
            f"{self.verdict}; {self.bytes:,} bytes in {len(self.modules)} modules",
            "",
            f"{'module':<{width}}  rank    energy     error",
        ]
        for row in self.modules:
            ranks = f"{row.rank_before}→{row.rank_after}" if row.rank_before != row.rank_after else str(row.rank_after)
            lines.append(f"{row.module:<{width}}  {ranks:<6} {row.energy:>7.2%}  {row.error:>8.3g}")
        return "\n".join(lines)
