"""Find the smallest rank that keeps a promise, from the singular values of every module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from adapters.adapter import LoraAdapter
from adapters.algebra.fuse import combined, dense_update
from adapters.algebra.job import Device, Job, bind
from adapters.algebra.lowrank import Factors, decompose
from adapters.errors import FusionError
from adapters.recipes import Recipe


def smallest_rank(
    recipe: Recipe, adapters: Mapping[str, LoraAdapter], *, max_error: float, device: Device = None
) -> int:
    """The smallest rank limit, one for all modules, at which the fusion's relative error is at most `max_error`.

    FusionError when the recipe's own rank cuts deeper than that. Methods on the true update need the singular
    values of every dense module.
    """
    if not 0 <= max_error < 1:
        raise FusionError(f"max_error is {max_error!r}: expected 0 or more and less than 1")
    whole, tails = 0.0, torch.zeros(1, dtype=torch.float64)
    for energies, own in _spectra(bind(recipe, adapters, None, device)):
        whole += float(energies.sum())
        tail = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])  # lost when cut at 0, 1, …
        if own is not None and own < len(energies):
            tail[own:] = tail[own]
        size = max(len(tails), len(tail))
        tails = _extended(tails, size) + _extended(tail, size)
    floor = torch.finfo(torch.float64).eps * whole * len(tails)  # what rounding leaves of nothing
    fits = (tails <= max_error**2 * whole + floor).nonzero()[:, 0]
    if not len(fits):
        lost = math.sqrt(float(tails[-1]) / whole)
        raise FusionError(f"{recipe.format()!r} itself loses {lost:.3g}: raise its own rank")
    return max(1, int(fits[0]))


def _spectra(job: Job) -> Iterator[tuple[Tensor, int | None]]:
    """Squared singular values of each module, falling, float64, and the recipe's own rank limit there."""
    for batch in job.batches():
        for name in batch:
            parents = job.parents(name)
            limit = job.limit(job.terms(parents))
            if job.method.on != "update":
                b, a = combined(job, name, parents).factors(torch.float64, job.device)
                yield decompose(Factors.of(b[None], a[None]))[2][0].square().cpu(), limit
            elif (update := dense_update(job, name, parents)) is not None:
                small = update.to(torch.float64) if update.shape[0] <= update.shape[1] else update.T.to(torch.float64)
                yield torch.linalg.eigvalsh(small @ small.T).clamp(min=0).flip(0).cpu(), limit


def _extended(tail: Tensor, size: int) -> Tensor:
    return torch.cat([tail, tail[-1:].expand(size - len(tail))])
