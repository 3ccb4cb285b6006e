"""Linear algebra on factors: B·A is never formed. Everything in float64, batched over modules of
one shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Cut:
    """One module's best approximation: its rank, the squared norm kept and lost, and the factors if
    asked for.

    `b` is d_out×rank and `a` rank×d_in, float64, each carrying the square root of the singular values.
    """

    rank: int
    kept: float
    lost: float
    b: Tensor | None
    a: Tensor | None


def inner(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> float:
    """⟨B1·A1, B2·A2⟩ (Frobenius) in float64, as the sum of (B1ᵀ·B2)∘(A1·A2ᵀ)."""
    left = b1.to(torch.float64).T @ b2.to(torch.float64)
    right = a1.to(torch.float64) @ a2.to(torch.float64).T
    return float((left * right).sum())


def truncate(b: Tensor, a: Tensor, limit: int, *, build: bool = True) -> list[Cut]:
    """The best approximation of every B·A of rank at most `limit` (Eckart and Young 1936).

    `b` is n×d_out×k, `a` is n×k×d_in, both float64. QR of both factors leaves a core of at most k×k
    whose singular values are those of B·A. Directions below rounding (of the factors' norms) count
    as zero and are dropped first, at no loss. With `build` False the factors are not computed; the
    numbers are the same to the last bit.
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    size = max(b.shape[-2], a.shape[-1], b.shape[-1])
    scale = torch.linalg.matrix_norm(r_b) * torch.linalg.matrix_norm(r_a)
    floor = torch.finfo(torch.float64).eps * size * scale
    sigma = torch.where(sigma > floor[:, None], sigma, torch.zeros_like(sigma))
    energies = sigma.square()
    cuts = []
    for i, count in enumerate((sigma > 0).sum(dim=-1).tolist()):
        rank = min(limit, max(1, count))
        kept, lost = float(energies[i, :rank].sum()), float(energies[i, rank:].sum())
        if not build:
            cuts.append(Cut(rank, kept, lost, None, None))
            continue
        left, right = q_b[i] @ u[i, :, :rank], vh[i, :rank] @ q_a[i].mT
        half = _signs(left) * sigma[i, :rank].sqrt()
        cuts.append(Cut(rank, kept, lost, left * half, right * half[:, None]))
    return cuts


def _signs(left: Tensor) -> Tensor:
    """±1 per column of `left`, so that its entry of largest magnitude becomes positive: one answer
    of the many.
    """
    peaks = left.gather(0, left.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(peaks < 0, -torch.ones_like(peaks), torch.ones_like(peaks))
