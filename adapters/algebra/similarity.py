"""How similar the parents of a fusion are in one module: norms, cosine, and entries of opposite sign."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapters.algebra.bound import Batch, BoundRecipe
from adapters.algebra.combine import WeightedUpdate
from adapters.algebra.lowrank import inner_products

SIGN_LINES = 128
"""Rows, and columns, of an update whose signs are compared: evenly spaced, all of them in a smaller one."""
CACHED_ENTRIES = 1 << 18
"""Entries of several modules that are compared together: few enough to stay in the processor's cache."""


@dataclass(frozen=True, slots=True)
class ParentSimilarity:
    """Frobenius norms of the parents' unweighted updates, the lowest cosine between two weighted ones (None
    with fewer than two, or zero ones), and the share of entries where weighted updates differ in sign.
    """

    norms: tuple[float, ...]
    cosine: float | None
    conflict: float | None


def compare_batch(bound: BoundRecipe, batch: Batch) -> list[ParentSimilarity]:
    """The similarities of a batch, whose factors are stacked for this alone."""
    b, a = batch.stack(bound.compute_dtype, bound.device)
    return compare_parents(b, a, inner_products(b, a), list(batch.parents.values()))


def compare_parents(
    b: Tensor, a: Tensor, gram: Tensor, rows: Sequence[Sequence[WeightedUpdate]]
) -> list[ParentSimilarity]:
    """The similarities of n modules of one shape with parents of the same ranks, whose factors lie side by side,
    unscaled: `b` n×d_out×k, `a` n×k×d_in, and `gram` the inner products of their k updates of rank 1, n×k×k.

    The share of conflicts is counted where SIGN_LINES rows and columns cross.
    """
    ranks = [parent.module.rank for parent in rows[0]]
    owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)).to(b.device)
    member = torch.nn.functional.one_hot(owner, len(ranks)).to(gram.dtype)
    inner_products: list[list[list[float]]] = (member.T @ gram @ member).tolist()
    conflicts: list[float | None] = [None] * len(rows)
    if len(ranks) > 1:
        signs = torch.tensor([[float(np.sign(parent.factor)) for parent in row] for row in rows], device=b.device)
        tall, wide = b[:, _spaced_indices(b.shape[1], b.device)], a[:, :, _spaced_indices(a.shape[2], a.device)]
        count = max(1, CACHED_ENTRIES // (tall.shape[1] * wide.shape[2]))
        for start in range(0, len(rows), count):
            chosen = slice(start, start + count)
            conflicts[chosen] = _count_conflicts(tall[chosen], wide[chosen], ranks, signs[chosen])
    similarities = []
    for parents, own_products, conflict in zip(rows, inner_products, conflicts, strict=True):
        norms = [math.sqrt(max(0.0, own_products[j][j])) for j in range(len(ranks))]
        scaled = tuple(abs(parent.module.scaling) * norm for parent, norm in zip(parents, norms, strict=True))
        similarities.append(ParentSimilarity(scaled, _lowest_cosine(norms, own_products, parents), conflict))
    return similarities


def _spaced_indices(size: int, device: torch.device) -> Tensor:
    """Indices of SIGN_LINES evenly spaced rows or columns out of `size`, or of all when there are fewer."""
    return torch.linspace(0, size - 1, min(size, SIGN_LINES), dtype=torch.float64).long().to(device)


def _lowest_cosine(
    norms: Sequence[float], inner_products: Sequence[Sequence[float]], parents: Sequence[WeightedUpdate]
) -> float | None:
    cosines = []
    for i in range(len(norms)):
        for j in range(i):
            if norms[i] and norms[j]:
                cosine = max(-1.0, min(1.0, inner_products[i][j] / (norms[i] * norms[j])))
                cosines.append(math.copysign(cosine, cosine * parents[i].factor * parents[j].factor))
    return min(cosines, default=None)


def _count_conflicts(b: Tensor, a: Tensor, ranks: Sequence[int], signs: Tensor) -> list[float]:
    """The shares of m modules: `b` m×rows×k, `a` m×k×columns, the parents' signs m×parents."""
    factors = zip(torch.split(b.float(), list(ranks), 2), torch.split(a.float(), list(ranks), 1), strict=True)
    updates = ((tall * signs[:, j, None, None]) @ wide for j, (tall, wide) in enumerate(factors))
    low = high = next(updates)
    for update in updates:
        low, high = torch.minimum(low, update), torch.maximum(high, update)
    counts: list[int] = torch.count_nonzero((low < 0) & (high > 0), dim=(1, 2)).tolist()
    return [count / low[0].numel() for count in counts]
