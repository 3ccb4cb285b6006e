"""How a method is carried out, by what it works on: a strategy is a file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from adapters.algebra import dense, exact, factorwise
from adapters.algebra.bound import Batch, BoundRecipe
from adapters.algebra.combine import WeightedUpdate
from adapters.algebra.result import ModuleResult


class FuseBatch(Protocol):
    """Fuses a batch of modules."""

    def __call__(self, bound: BoundRecipe, batch: Batch, *, build: bool) -> list[ModuleResult]:
        """The results in the batch's order, without factors unless `build`."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """The two functions a strategy's file has: one fuses, the other tells what any rank would lose.

    `compute_energies(bound, module, parents)` gives the squared singular values of the module's update before any
    truncation, falling, float64.
    """

    fuse_batch: FuseBatch
    compute_energies: Callable[[BoundRecipe, str, Sequence[WeightedUpdate]], Tensor]


STRATEGIES: Mapping[str, Strategy] = {
    "factors": Strategy(exact.fuse_batch, exact.compute_energies),
    "factorwise": Strategy(factorwise.fuse_batch, factorwise.compute_energies),
    "update": Strategy(dense.fuse_batch, dense.compute_energies),
}
"""By `Method.on`."""
