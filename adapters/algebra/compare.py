"""How the parents of a fusion stand to each other in one module: norms, cosine, and entries of opposite sign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from adapters.algebra.combine import Part

SIGN_LINES = 128
"""Rows, and columns, of an update whose signs are looked at: evenly spread, all of them in a smaller one."""
CACHED_ENTRIES = 1 << 18
"""Of several modules looked at together: few enough to stay in the processor's cache."""


@dataclass(frozen=True, slots=True)
class Kinship:
    """Frobenius norms of the parents' unweighted updates, the lowest cosine between two weighted ones (None
    with fewer than two, or zero ones), and the share of entries where weighted updates differ in sign.
    """

    norms: tuple[float, ...]
    cosine: float | None
    conflict: float | None


def kinships(b: Tensor, a: Tensor, gram: Tensor, parents: Sequence[Sequence[Part]]) -> list[Kinship]:
    """Of n modules of one shape with parents of the same ranks, whose factors lie side by side, as they are:
    `b` n×d_out×k, `a` n×k×d_in, and `gram` the inner products of their k updates of rank 1, n×k×k.

    The share of conflicts is counted where SIGN_LINES rows and columns cross.
    """
    ranks = [part.module.rank for part in parents[0]]
    owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)).to(b.device)
    member = torch.nn.functional.one_hot(owner, len(ranks)).to(gram.dtype)
    products: list[list[list[float]]] = (member.T @ gram @ member).tolist()
    conflicts: list[float | None] = [None] * len(parents)
    if len(ranks) > 1:
        signs = torch.tensor([[float(numpy.sign(part.factor)) for part in found] for found in parents], device=b.device)
        tall, flat = b[:, _spread(b.shape[1], b.device)], a[:, :, _spread(a.shape[2], a.device)]
        few = max(1, CACHED_ENTRIES // (tall.shape[1] * flat.shape[2]))
        for start in range(0, len(parents), few):
            now = slice(start, start + few)
            conflicts[now] = _conflicts(tall[now], flat[now], ranks, signs[now])
    kin = []
    for i, found in enumerate(parents):
        norms = [math.sqrt(max(0.0, products[i][j][j])) for j in range(len(ranks))]
        sizes = tuple(abs(part.module.scaling) * norm for part, norm in zip(found, norms, strict=True))
        kin.append(Kinship(sizes, _lowest(norms, products[i], found), conflicts[i]))
    return kin


def _spread(size: int, device: torch.device) -> Tensor:
    """The numbers of SIGN_LINES evenly spread lines of `size`."""
    return torch.linspace(0, size - 1, min(size, SIGN_LINES), dtype=torch.float64).long().to(device)


def _lowest(norms: Sequence[float], products: Sequence[Sequence[float]], parts: Sequence[Part]) -> float | None:
    found = []
    for i in range(len(norms)):
        for j in range(i):
            if norms[i] and norms[j]:
                cosine = max(-1.0, min(1.0, products[i][j] / (norms[i] * norms[j])))
                found.append(math.copysign(cosine, cosine * parts[i].factor * parts[j].factor))
    return min(found, default=None)


def _conflicts(b: Tensor, a: Tensor, ranks: Sequence[int], signs: Tensor) -> list[float]:
    """The shares of m modules: `b` m×rows×k, `a` m×k×d_in, the parents' signs m×parents."""
    low = high = None
    talls, flats = torch.split(b.float(), list(ranks), 2), torch.split(a.float(), list(ranks), 1)
    for j, (tall, flat) in enumerate(zip(talls, flats, strict=True)):
        update = (tall * signs[:, j, None, None]) @ flat
        low = update if low is None else torch.minimum(low, update)
        high = update if high is None else torch.maximum(high, update)
    assert low is not None and high is not None
    counts: list[int] = torch.count_nonzero((low < 0) & (high > 0), dim=(1, 2)).tolist()
    return [count / low[0].numel() for count in counts]
