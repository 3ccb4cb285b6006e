"""Methods on the true update: one dense module at a time, truncated to its best approximation at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from adapters.algebra.bound import Batch, BoundRecipe
from adapters.algebra.combine import WeightedUpdate
from adapters.algebra.factors import Device, LowRankSum
from adapters.algebra.lowrank import truncate_dense
from adapters.algebra.result import ModuleResult
from adapters.algebra.similarity import compare_batch


def fuse_batch(bound: BoundRecipe, batch: Batch, *, build: bool) -> list[ModuleResult]:
    """The results of a batch, in its order."""
    results = []
    for (name, parents), similarity in zip(batch.parents.items(), compare_batch(bound, batch), strict=True):
        shape, update = bound.shapes[name], _merge(bound, name, parents)
        if update is None:
            factors = LowRankSum(shape, ()).factors(torch.float32, bound.device) if build else None
            results.append(ModuleResult(1, 1, similarity, factors))
        else:
            cut = truncate_dense(update, bound.rank_limit(bound.nonzero_terms(parents)) or min(shape), build=build)
            results.append(ModuleResult(min(shape), 1, similarity).apply(cut))
    return results


def compute_energies(bound: BoundRecipe, name: str, parents: Sequence[WeightedUpdate]) -> Tensor:
    """Squared singular values of the module's update before any truncation, descending, float64; none for zero."""
    update = _merge(bound, name, parents)
    if update is None:
        return torch.zeros(0, dtype=torch.float64)
    small = update.to(torch.float64) if update.shape[0] <= update.shape[1] else update.T.to(torch.float64)
    energies: Tensor = torch.linalg.eigvalsh(small @ small.T).clamp(min=0).flip(0).cpu()
    return energies


def _merge(bound: BoundRecipe, name: str, parents: Sequence[WeightedUpdate]) -> Tensor | None:
    """The module's update, d_out×d_in float32 or better; None for zero."""
    terms, context = bound.nonzero_terms(parents), bound.context(name, parents)
    if not terms:
        return None
    sparse = [context.sparsify(_build_update(term, bound.device), context.draw(term)) for term in terms]
    return context.merge(sparse, [term.weight for term in terms])


def _build_update(term: WeightedUpdate, device: Device) -> Tensor:
    """scaling·B·A, without the weight."""
    module, dtype = term.module, term.module.compute_dtype
    return (module.b.to(device, dtype) * module.scaling) @ module.a.to(device, dtype)
