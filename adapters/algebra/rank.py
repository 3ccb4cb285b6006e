"""Find the smallest rank within max_error, from the singular values of every module."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from adapters.adapter import LoraAdapter
from adapters.algebra.bound import bind
from adapters.algebra.factors import Device
from adapters.algebra.strategy import STRATEGIES
from adapters.errors import FusionError, quote
from adapters.recipes import Recipe


def smallest_rank(
    recipe: Recipe,
    adapters: Mapping[str, LoraAdapter],
    *,
    max_error: float,
    device: Device = None,
    same_base: bool = False,
) -> int:
    """The smallest rank limit, one for all modules, at which the fusion's relative error is at most `max_error`.

    FusionError when the recipe's own rank truncates deeper than that. Methods on the true update need the singular
    values of every dense module.
    """
    if not 0 <= max_error < 1:
        raise FusionError(f"max_error is {max_error!r}: expected 0 or more and less than 1")
    bound = bind(recipe, adapters, None, device, same_base=same_base)
    compute_energies = STRATEGIES[bound.method.on].compute_energies
    total, tails = 0.0, torch.zeros(1, dtype=torch.float64)
    for batch in bound.batches():
        for name, parents in batch.parents.items():
            energies, limit = compute_energies(bound, name, parents), bound.rank_limit(bound.nonzero_terms(parents))
            total += float(energies.sum())
            tail = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])  # lost at rank 0, 1, …
            if limit is not None and limit < len(energies):
                tail[limit:] = tail[limit]
            size = max(len(tails), len(tail))
            tails = _extend(tails, size) + _extend(tail, size)
    floor = torch.finfo(torch.float64).eps * total * len(tails)  # zero, up to rounding
    fits = (tails <= max_error**2 * total + floor).nonzero()[:, 0]
    if not len(fits):
        lost = math.sqrt(float(tails[-1]) / total)
        raise FusionError(
            f"{quote(recipe.format())} itself loses {lost:.3g}, over max_error={max_error:g}: raise its rank"
        )
    return max(1, int(fits[0]))


def _extend(tail: Tensor, size: int) -> Tensor:
    """`tail` with its last number repeated up to `size` numbers."""
    return torch.cat([tail, tail[-1:].expand(size - len(tail))])
