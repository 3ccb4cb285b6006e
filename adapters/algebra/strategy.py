"""How a method is carried out, by what it works on: a strategy is a file with these two functions."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from adapters.algebra import dense, exact, factorwise
from adapters.algebra.bound import Batch, BoundRecipe
from adapters.algebra.combine import WeightedUpdate
from adapters.algebra.result import ModuleResult


class Strategy(Protocol):
    """One kind of methods."""

    def fuse_batch(self, bound: BoundRecipe, batch: Batch, *, build: bool) -> list[ModuleResult]:
        """The results of a batch, in its order, without factors unless `build`."""

    def compute_energies(self, bound: BoundRecipe, name: str, parents: Sequence[WeightedUpdate]) -> Tensor:
        """Squared singular values of a module's update before any truncation, descending, float64."""


STRATEGIES: Mapping[str, Strategy] = {"factors": exact, "factorwise": factorwise, "update": dense}
"""By `Method.on`."""
