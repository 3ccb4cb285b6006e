"""What a recipe costs in fidelity: rank, energy kept, relative error, per module and overall."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One module: its rank before and after, the share of ‖ΔW‖² kept, and the relative Frobenius error
    against the method's own update before the cut.

    `norms` are the parents' ‖ΔW‖ at weight 1, `cosine` the lowest between two weighted parents (None with
    fewer than two), `conflict` the share of entries where weighted parents differ in sign (see `compare`).
    """

    module: str
    rank_before: int
    rank_after: int
    energy: float
    error: float
    norms: Mapping[str, float]
    cosine: float | None
    conflict: float | None


@dataclass(frozen=True, slots=True)
class FusionReport:
    """A whole fusion.

    `error` is ‖ΔW − ΔW′‖ / ‖ΔW‖ over all modules (Frobenius), `energy` is 1 − error². Both count
    what truncation loses, not the rounding into the adapters' dtype. `exact` means that nothing was
    lost; `departure` is set for methods that take A and B apart, which are approximate by themselves: the
    relative distance from the exact weighted sum. `rank` is the largest of any module; `bytes` those of the
    factors.
    """

    recipe: str
    method: str
    rank: int
    error: float
    energy: float
    exact: bool
    departure: float | None
    bytes: int
    modules: tuple[ModuleReport, ...]

    @property
    def verdict(self) -> str:
        """One line for people."""
        if self.exact:
            return f"exact at rank {self.rank}"
        cut = f"rank {self.rank} keeps {self.energy:.2%} of the energy, relative error {self.error:.3g}"
        if self.departure is None:
            return cut
        apart = f"approximate: A and B are merged apart, {self.departure:.3g} away from the exact weighted sum"
        return apart if self.error == 0.0 else f"{apart}; {cut}"

    def to_json(self) -> dict[str, object]:
        """All fields and the verdict, in JSON types."""
        return {**asdict(self), "modules": [asdict(row) for row in self.modules], "verdict": self.verdict}

    def table(self) -> str:
        """The recipe, the verdict and one line per module."""
        width = max(len("module"), *(len(row.module) for row in self.modules))
        parents = sorted({name for row in self.modules for name in row.norms})
        norms = "".join(f"  {'‖' + name + '‖':>{_wide(name)}}" for name in parents)
        lines = [
            self.recipe,
            f"{self.verdict}; {self.bytes:,} bytes in {len(self.modules)} modules",
            "",
            f"{'module':<{width}}  rank      energy     error{norms}  cosine  conflict",
        ]
        for row in self.modules:
            ranks = f"{row.rank_before}→{row.rank_after}" if row.rank_before != row.rank_after else str(row.rank_after)
            norms = "".join(f"  {_cell(row.norms.get(name), '.4g'):>{_wide(name)}}" for name in parents)
            lines.append(
                f"{row.module:<{width}}  {ranks:<8} {row.energy:>7.2%}  {row.error:>8.3g}{norms}"
                f"  {_cell(row.cosine, '.3f'):>6}  {_cell(row.conflict, '.1%'):>8}"
            )
        return "\n".join(lines)


def _wide(name: str) -> int:
    return max(9, len(name) + 2)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
