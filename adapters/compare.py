"""How the parents of a fusion stand to each other in one module: norms, cosine, and entries of opposite sign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from .combine import Part
from .lowrank import Factors

SIGN_ENTRIES = 1 << 15


@dataclass(frozen=True, slots=True)
class Kinship:
    """Frobenius norms of the parents' unweighted updates, the lowest cosine between two weighted ones (None
    with fewer than two, or zero ones), and the share of entries where weighted updates differ in sign.
    """

    norms: tuple[float, ...]
    cosine: float | None
    conflict: float | None


def kinships(x: Factors, parents: Sequence[Sequence[Part]]) -> list[Kinship]:
    """Of n modules of one shape with parents of the same ranks, whose factors `x` holds side by side, as they are.

    The share of conflicts is counted on evenly spread rows, all of them up to SIGN_ENTRIES entries.
    """
    b, a, gram = x.b, x.a, x.gram_b * x.gram_a
    ranks = [part.module.rank for part in parents[0]]
    owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)).to(b.device)
    member = torch.nn.functional.one_hot(owner, len(ranks)).to(gram.dtype)
    products = (member.T @ gram @ member).tolist()
    chosen = torch.linspace(0, b.shape[1] - 1, max(1, min(b.shape[1], SIGN_ENTRIES // a.shape[2]))).long().to(b.device)
    kin = []
    for i, found in enumerate(parents):
        norms = [math.sqrt(max(0.0, products[i][j][j])) for j in range(len(ranks))]
        conflict = _conflict(b[i, chosen], a[i], ranks, [part.factor for part in found]) if len(ranks) > 1 else None
        sizes = tuple(abs(part.module.scaling) * norm for part, norm in zip(found, norms, strict=True))
        kin.append(Kinship(sizes, _lowest(norms, products[i], found), conflict))
    return kin


def _lowest(norms: Sequence[float], products: Sequence[Sequence[float]], parts: Sequence[Part]) -> float | None:
    found = []
    for i in range(len(norms)):
        for j in range(i):
            if norms[i] and norms[j]:
                cosine = max(-1.0, min(1.0, products[i][j] / (norms[i] * norms[j])))
                found.append(math.copysign(cosine, cosine * parts[i].factor * parts[j].factor))
    return min(found, default=None)


def _conflict(b: Tensor, a: Tensor, ranks: Sequence[int], factors: Sequence[float]) -> float:
    """The share for some rows of one module: few enough entries to stay in the processor's cache."""
    low = high = None
    talls, flats = torch.split(b.float(), list(ranks), 1), torch.split(a.float(), list(ranks))
    for tall, flat, factor in zip(talls, flats, factors, strict=True):
        update = (tall * float(numpy.sign(factor))) @ flat
        low = update if low is None else torch.minimum(low, update)
        high = update if high is None else torch.maximum(high, update)
    assert low is not None and high is not None
    return float(torch.count_nonzero((low < 0) & (high > 0))) / low.numel()
