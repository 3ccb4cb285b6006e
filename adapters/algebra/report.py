"""What a recipe costs in fidelity: rank, energy kept, relative error, per module and overall."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from adapters.algebra.bound import BoundRecipe
from adapters.algebra.combine import WeightedUpdate
from adapters.algebra.result import ModuleResult


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One module: its rank before and after, the share of ‖ΔW‖² kept, and the relative Frobenius error
    against the method's own update before truncation.

    `norms` are the parents' ‖ΔW‖ at weight 1, `cosine` the lowest between two weighted parents (None with
    fewer than two), `conflict` the share of entries where weighted parents differ in sign (see `similarity`).
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
    lost; `departure` is set for methods that merge A and B separately, which are approximate by themselves: the
    relative distance from the exact weighted sum. `rank` is the largest of any module, `bytes` the size of all
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
        """The fidelity in one sentence: exact, or what is lost."""
        if self.exact:
            return f"exact at rank {self.rank}"
        cut = f"rank {self.rank} keeps {self.energy:.2%} of the energy, relative error {self.error:.3g}"
        if self.departure is None:
            return cut
        merged = f"approximate: A and B are merged separately, {self.departure:.3g} from the exact weighted sum"
        return merged if self.error == 0.0 else f"{merged}; {cut}"

    def to_json(self) -> dict[str, object]:
        """All fields and the verdict, in JSON types."""
        content = {one.name: getattr(self, one.name) for one in fields(self)}  # `asdict` copies each value, slowly
        rows = [{one.name: getattr(row, one.name) for one in fields(row)} for row in self.modules]
        return {**content, "modules": rows, "verdict": self.verdict}

    def table(self) -> str:
        """The recipe, the verdict and one line per module."""
        width = max(len("module"), *(len(row.module) for row in self.modules))
        parents = sorted({name for row in self.modules for name in row.norms})
        norms = "".join(f"  {'‖' + name + '‖':>{_width(name)}}" for name in parents)
        lines = [
            self.recipe,
            f"{self.verdict}; {self.bytes:,} bytes in {len(self.modules)} modules",
            "",
            f"{'module':<{width}}  rank      energy     error{norms}  cosine  conflict",
        ]
        for row in self.modules:
            ranks = f"{row.rank_before}→{row.rank_after}" if row.rank_before != row.rank_after else str(row.rank_after)
            norms = "".join(f"  {_cell(row.norms.get(name), '.4g'):>{_width(name)}}" for name in parents)
            lines.append(
                f"{row.module:<{width}}  {ranks:<8} {row.energy:>7.2%}  {row.error:>8.3g}{norms}"
                f"  {_cell(row.cosine, '.3f'):>6}  {_cell(row.conflict, '.1%'):>8}"
            )
        return "\n".join(lines)


def _width(name: str) -> int:
    return max(9, len(name) + 2)


def _cell(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


@dataclass(slots=True)
class ReportBuilder:
    """Grows module by module; `finish` makes the report."""

    bound: BoundRecipe
    rows: dict[str, ModuleReport] = field(default_factory=dict)
    results: dict[str, ModuleResult] = field(default_factory=dict)

    def add(self, name: str, parents: Sequence[WeightedUpdate], result: ModuleResult) -> None:
        """Enter one module; its factors are not kept."""
        share = result.lost_energy / (result.kept_energy + result.lost_energy) if result.lost_energy else 0.0
        self.rows[name] = ModuleReport(
            module=name,
            rank_before=result.rank_before,
            rank_after=result.rank,
            energy=1.0 - share,
            error=math.sqrt(share),
            norms=dict(zip((parent.name for parent in parents), result.similarity.norms, strict=True)),
            cosine=result.similarity.cosine,
            conflict=result.similarity.conflict,
        )
        self.results[name] = replace(result, factors=None)

    def finish(self) -> FusionReport:
        """The report of the whole fusion."""
        results = self.results.values()
        lost = sum(result.lost_energy for result in results)
        share = lost / sum(result.kept_energy + result.lost_energy for result in results) if lost else 0.0
        departure = None
        if self.bound.method.on == "factorwise":
            reference = sum(result.reference for result in results)
            departure = math.sqrt(sum(result.departure for result in results) / reference) if reference else 0.0
        sizes = (self.results[name].rank * sum(shape) for name, shape in self.bound.shapes.items())
        return FusionReport(
            recipe=self.bound.recipe.format(),
            method=self.bound.recipe.method,
            rank=max(result.rank for result in results),
            error=math.sqrt(share),
            energy=1.0 - share,
            exact=lost == 0.0 and departure is None,
            departure=departure,
            bytes=sum(sizes) * self.bound.dtype.itemsize,
            modules=tuple(self.rows[name] for name in self.bound.shapes),
        )
