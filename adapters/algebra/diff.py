"""How far two adapters are apart as updates of the base, whatever their ranks: norms and cosines from Gram
matrices of the factors, principal angles from their orthogonal bases.
"""

import math
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from torch import Tensor

from adapters.adapter import LoraAdapter, LoraModule
from adapters.algebra.combine import column_space
from adapters.algebra.lowrank import inner
from adapters.together import check_together


@dataclass(frozen=True, slots=True)
class ModuleDifference:
    """One module: both Frobenius norms, ‖ΔW₁ − ΔW₂‖, and the cosine between them (None when one is zero).

    `column_angles` and `row_angles` are the principal angles between the two column spaces (what the updates
    write) and row spaces (what they read), in degrees, ascending; 0 is shared, 90 has nothing in common. Empty
    when one is zero. Inner products are exact to about 1e-16 of ‖ΔW‖², so a distance below 1e-8 of the norms
    is rounding.
    """

    module: str
    norm_a: float
    norm_b: float
    distance: float
    cosine: float | None
    column_angles: tuple[float, ...] = ()
    row_angles: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """Two adapters: the same over all modules together (a module that one of them lacks is zero), and per module."""

    norm_a: float
    norm_b: float
    distance: float
    cosine: float | None
    modules: tuple[ModuleDifference, ...]

    def to_json(self) -> dict[str, object]:
        """All fields in JSON types."""
        content = asdict(self)
        return {**content, "modules": list(content["modules"])}

    def table(self) -> str:
        """The overall line and one line per module."""
        width = max(len("all modules"), *(len(row.module) for row in self.modules))
        head = f"{'module':<{width}}  {'‖first‖':>9}  {'‖second‖':>9}  {'distance':>9}   cosine"
        lines = [f"{head}  mean angle of columns, rows"]
        overall = ModuleDifference("all modules", self.norm_a, self.norm_b, self.distance, self.cosine)
        for row in (overall, *self.modules):
            cosine = "-" if row.cosine is None else f"{row.cosine:.4f}"
            angles = f"  {fmean(row.column_angles):.1f}°, {fmean(row.row_angles):.1f}°" if row.row_angles else ""
            lines.append(
                f"{row.module:<{width}}  {row.norm_a:>9.4g}  {row.norm_b:>9.4g}  {row.distance:>9.4g}"
                f"  {cosine:>7}{angles}"
            )
        return "\n".join(lines)


def diff(first: LoraAdapter, second: LoraAdapter, *, same_base: bool = False) -> Difference:
    """Compare two adapters of one base; AdapterError 'shape', 'base' or 'modules' when they are not, the last two
    unless `same_base` says that they are.
    """
    check_together({"first": first, "second": second}, same_base=same_base)
    rows, squares = [], [0.0, 0.0, 0.0]
    for name in sorted({*first.modules, *second.modules}):
        one, two = first.modules.get(name), second.modules.get(name)
        products = (_inner(one, one), _inner(two, two), _inner(one, two))
        rows.append(ModuleDifference(name, *_compare(*products), *_angles(one, two)))
        squares = [total + part for total, part in zip(squares, products, strict=True)]
    return Difference(*_compare(*squares), modules=tuple(rows))


def _angles(one: LoraModule | None, two: LoraModule | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Principal angles between the column and between the row spaces (Björck and Golub 1973,
    https://doi.org/10.2307/2005662).
    """
    if one is None or two is None or not (one.scaling and two.scaling):
        return (), ()
    transposed = [LoraModule(module.b.T, module.a.T, module.scaling) for module in (one, two)]
    return _principal_angles(column_space(one), column_space(two)), _principal_angles(*map(column_space, transposed))


def _principal_angles(first: Tensor, second: Tensor) -> tuple[float, ...]:
    """In degrees, ascending; from their sines where they are small, since the cosines of small angles are all alike."""
    if not first.shape[1] or not second.shape[1]:
        return ()
    if first.shape[1] > second.shape[1]:
        first, second = second, first
    cosines = torch.linalg.svdvals(first.T @ second).clamp(0, 1)
    sines = torch.linalg.svdvals(first - second @ (second.T @ first)).clamp(0, 1).flip(0)
    angles = torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())
    return tuple(math.degrees(float(angle)) for angle in angles)


def _inner(one: LoraModule | None, two: LoraModule | None) -> float:
    if one is None or two is None:
        return 0.0
    return one.scaling * two.scaling * inner(one.b, one.a, two.b, two.a)


def _compare(aa: float, bb: float, ab: float) -> tuple[float, float, float, float | None]:
    """(norm, norm, distance, cosine) from the three inner products."""
    norm_a, norm_b = math.sqrt(max(aa, 0.0)), math.sqrt(max(bb, 0.0))
    cosine = max(-1.0, min(1.0, ab / (norm_a * norm_b))) if norm_a and norm_b else None
    return norm_a, norm_b, math.sqrt(max(aa + bb - 2 * ab, 0.0)), cosine
