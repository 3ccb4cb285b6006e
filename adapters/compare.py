"""How the parents of a fusion stand to each other in one module: norms, cosine, and entries of opposite sign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIGN_ENTRIES = 1 << 15


@dataclass(frozen=True, slots=True)
class Kinship:
    """Frobenius norms of the parents' unweighted updates, the lowest cosine between two weighted ones (None
    with fewer than two, or zero ones), and the share of entries where weighted updates differ in sign.
    """

    norms: tuple[float, ...]
    cosine: float | None
    conflict: float | None


def kinships(b: Tensor, a: Tensor, ranks: Sequence[int], weights: Sequence[Sequence[float]]) -> list[Kinship]:
    """Of n modules of one shape: `b` n×d_out×k holds the parents' B side by side, scalings folded in, `a`
    n×k×d_in their A; `ranks` are the parents' shares of k, `weights` [n][parent] their weights there.

    The numbers are as exact as the factors, float32 (about 1e-7) or float64. The share of conflicts is counted on evenly spread rows, all of them up to SIGN_ENTRIES entries.
    """
    n, count = b.shape[0], len(ranks)
    gram = _gram(b, a)
    if not bool(gram.isfinite().all()):  # float32 holds the factors, not the squares of such numbers
        gram = _gram(b.to(torch.float64), a.to(torch.float64))
    owner = torch.repeat_interleave(torch.arange(count), torch.tensor(ranks)).to(b.device)
    member = torch.nn.functional.one_hot(owner, count).to(gram.dtype)
    products = member.T @ gram @ member
    norms = products.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().tolist()
    cosines = products.tolist()
    conflicts = _conflicts(b, a, ranks, torch.tensor(weights)) if count > 1 else [None] * n
    return [Kinship(tuple(norms[i]), _lowest(norms[i], cosines[i], weights[i]), conflicts[i]) for i in range(n)]


def _gram(b: Tensor, a: Tensor) -> Tensor:
    """Inner products of the rank-one updates, n×k×k float64."""
    return (b.mT @ b).to(torch.float64) * (a @ a.mT)


def _lowest(norms: Sequence[float], products: Sequence[Sequence[float]], weights: Sequence[float]) -> float | None:
    found = []
    for i in range(len(norms)):
        for j in range(i):
            if norms[i] and norms[j]:
                cosine = max(-1.0, min(1.0, products[i][j] / (norms[i] * norms[j])))
                found.append(math.copysign(1.0, weights[i] * weights[j]) * cosine)
    return min(found, default=None)


def _conflicts(b: Tensor, a: Tensor, ranks: Sequence[int], weights: Tensor) -> list[float | None]:
    rows = max(1, min(b.shape[1], SIGN_ENTRIES // a.shape[2]))
    chosen = torch.linspace(0, b.shape[1] - 1, rows).long().to(b.device)
    some, every = torch.split(b[:, chosen].float(), list(ranks), 2), torch.split(a.float(), list(ranks), 1)
    signs = weights.sign().to(b.device, torch.float32)
    low = high = None
    for i, (tall, flat) in enumerate(zip(some, every, strict=True)):
        update = (tall * signs[:, i, None, None]) @ flat
        low = update if low is None else torch.minimum(low, update)
        high = update if high is None else torch.maximum(high, update)
    assert low is not None and high is not None
    return [float(share) for share in ((low < 0) & (high > 0)).to(torch.float64).mean(dim=(1, 2))]
