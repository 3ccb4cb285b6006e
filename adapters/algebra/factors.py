"""Low-rank factors side by side: a weighted sum of B·A's is one B·A of their ranks added up."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.adapter import LoraModule, empty
from adapters.algebra.lowrank import DOUBLE, FactorPair, GramFactors, decompose, inner

Device = torch.device | str | None


@dataclass(frozen=True, slots=True)
class LowRankSum:
    """One module's update as a weighted sum of LoRA updates, not yet built; zero without terms."""

    shape: tuple[int, int]
    terms: tuple[tuple[float, LoraModule], ...]

    @property
    def rank(self) -> int:
        """The ranks of its terms added up, 1 without terms."""
        return sum(module.rank for _, module in self.terms) or 1

    def factors(self, dtype: torch.dtype, device: Device) -> FactorPair:
        """B with weights and scalings multiplied in, d_out×rank, and A, rank×d_in."""
        b, a = build_sums([self], dtype, device)
        return FactorPair(b[0], a[0])

    def square(self) -> float:
        """‖ΔW‖², in float64."""
        b, a = self.factors(DOUBLE, None)
        return max(0.0, inner(b, a, b, a))

    def energies(self, device: Device) -> Tensor:
        """Squared singular values descending, float64 on the CPU."""
        b, a = self.factors(DOUBLE, device)
        return decompose(GramFactors.compute(b[None], a[None])).sigma[0].square().cpu()


def stack_factors(rows: Sequence[Sequence[LoraModule]], dtype: torch.dtype, device: Device) -> FactorPair:
    """The factors of each row's modules side by side, unscaled: n×d_out×k and n×k×d_in. All rows have the shapes
    and ranks of the first.
    """
    (d_out, d_in), rank = rows[0][0].shape, sum(module.rank for module in rows[0])
    b, a = empty((len(rows), d_out, rank), dtype, device), empty((len(rows), rank, d_in), dtype, device)
    for i, modules in enumerate(rows):
        start = 0
        for module in modules:
            stop = start + module.rank
            b[i, :, start:stop] = module.b
            a[i, start:stop] = module.a
            start = stop
    return FactorPair(b, a)


def spread(rows: Sequence[Sequence[tuple[float, int]]], device: Device) -> Tensor:
    """Per row (number, rank) pairs as one number per coordinate of the rank, n×1×k float64."""
    numbers = [[number for number, rank in row for _ in range(rank)] for row in rows]
    return torch.tensor(numbers, dtype=DOUBLE, device=device)[:, None]


def build_sums(sums: Sequence[LowRankSum], dtype: torch.dtype, device: Device) -> FactorPair:
    """The factors of sums of one shape and the same ranks, weights and scalings in B: n×d_out×k and n×k×d_in."""
    if not sums[0].terms:
        (d_out, d_in), n = sums[0].shape, len(sums)
        zeros = torch.zeros(n, d_out + d_in, 1, dtype=dtype, device=device)
        return FactorPair(zeros[:, :d_out], zeros[:, d_out:].mT)
    b, a = stack_factors([[module for _, module in total.terms] for total in sums], dtype, device)
    scale = spread([[(weight * m.scaling, m.rank) for weight, m in total.terms] for total in sums], device)
    return FactorPair(b.mul_(scale.to(dtype)), a)
