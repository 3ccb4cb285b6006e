"""Linear algebra on factors: B·A is never formed unless a method needs the dense update. Batched over modules of
one shape; float64, but for dense updates, which are cut in their own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_CONDITION = 1e4
"""Up to this condition number (1-norm, of the factor with unit columns) CholeskyQR loses at most its square
times 1e-16 of orthogonality, 1e-8; beyond it Householder QR is used.
"""
OVERSAMPLE = 10
MAX_STEPS = 40
SETTLED = 1e-7
"""The Krylov space grows until a step adds less than this share of ‖W‖² to what the best rank keeps."""
DENSE_LIMIT = 1024
"""Up to this many rows or columns the eigenvectors of the Gram matrix are as fast."""


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


def cholesky_qr(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """(R, R⁻¹), n×k×k, with x·R⁻¹ orthonormal for x n×d×k float64, without forming it; None where the columns of
    any of the n are too dependent for it (MAX_CONDITION).

    The columns are brought to unit length first. https://doi.org/10.1137/18M1218212 bounds the loss.
    """
    gram = x.mT @ x
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    if not bool((length > 0).all()):
        return None
    factor, failed = torch.linalg.cholesky_ex(gram / (length[..., :, None] * length[..., None, :]), upper=True)
    if bool(failed.any()):
        return None
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(factor)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=True)
    condition = torch.linalg.matrix_norm(factor, ord=1) * torch.linalg.matrix_norm(inverse, ord=1)
    if not bool((condition <= MAX_CONDITION).all()):
        return None
    return factor * length[..., None, :], inverse / length[..., :, None]


def decompose(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(left, U, σ, Vh, right) of n×d_out×k `b` and n×k×d_in `a`: B·A = left·U·diag(σ)·Vh·right, where left·U and
    Vh·right are orthonormal and σ falls. CholeskyQR of the factors where it is safe, else Householder QR.
    """
    tall, wide = cholesky_qr(b), cholesky_qr(a.mT)
    if tall is None or wide is None:
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.mT)
        u, sigma, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        return q_b, u, sigma, vh, q_a.mT
    (r_b, inverse_b), (r_a, inverse_a) = tall, wide
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return b, inverse_b @ u, sigma, vh @ inverse_a.mT, a


def truncate(b: Tensor, a: Tensor, limit: int, *, build: bool = True) -> list[Cut]:
    """The best approximation of every B·A of rank at most `limit` (Eckart and Young 1936).

    `b` is n×d_out×k, `a` is n×k×d_in, both float64. An orthogonal basis of both factors leaves a core of at
    most k×k whose singular values are those of B·A. Directions below rounding (of the factors' norms) count
    as zero and are dropped first, at no loss. With `build` False the factors are not computed; the
    numbers are the same to the last bit.
    """
    left, u, sigma, vh, right = decompose(b, a)
    size = max(b.shape[-2], a.shape[-1], b.shape[-1])
    scale = torch.linalg.matrix_norm(b) * torch.linalg.matrix_norm(a)
    floor = torch.finfo(torch.float64).eps * size * scale
    sigma = torch.where(sigma > floor[:, None], sigma, torch.zeros_like(sigma))
    counts = (sigma > 0).sum(dim=-1).tolist()
    rank = min(limit, max(1, *counts))
    half = sigma[:, None, :rank].sqrt()
    if build:
        tall, wide = left @ (u[..., :rank] * half), (vh[..., :rank, :] * half.mT) @ right
    energies = sigma.square()
    cuts = []
    for i, count in enumerate(counts):
        own = min(limit, max(1, count))
        kept, lost = float(energies[i, :own].sum()), float(energies[i, own:].sum())
        if not build:
            cuts.append(Cut(own, kept, lost, None, None))
            continue
        signs = fixed_signs(tall[i, :, :own])
        cuts.append(Cut(own, kept, lost, tall[i, :, :own] * signs, wide[i, :own] * signs[:, None]))
    return cuts


def fixed_signs(left: Tensor) -> Tensor:
    """±1 per column of `left`, so that its entry of largest magnitude becomes positive: one answer
    of the many.
    """
    peaks = left.gather(0, left.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(peaks < 0, -torch.ones_like(peaks), torch.ones_like(peaks))


def truncate_dense(w: Tensor, limit: int, *, build: bool = True) -> Cut:
    """The best approximation of a dense d_out×d_in matrix of rank at most `limit`.

    Large matrices: a block Krylov space (https://arxiv.org/abs/1504.05477), grown until another step adds less
    than SETTLED of ‖W‖² to the energy kept, then the SVD of W seen from it. The start is fixed, so the same
    matrix gives the same answer.
    """
    if not bool(torch.linalg.vector_norm(w) > 0):
        return Cut(1, 0.0, 0.0, w.new_zeros(w.shape[0], 1), w.new_zeros(1, w.shape[1]))
    small = min(w.shape) <= max(DENSE_LIMIT, 4 * limit)
    u, sigma, vh = _gram_svd(w.to(torch.float64)) if small else _krylov_svd(w, limit)
    rank = min(limit, max(1, int((sigma > 0).sum())))
    energies, half = sigma.square(), sigma[:rank].sqrt()
    kept, b, a = float(energies[:rank].sum()), u[:, :rank] * half, vh[:rank] * half[:, None]
    if small:
        lost = float(energies[rank:].sum())
    else:  # the rest of the spectrum is not known
        lost = float(torch.linalg.vector_norm(torch.addmm(w, b.to(w), a.to(w), alpha=-1))) ** 2
    if not build:
        return Cut(rank, kept, lost, None, None)
    signs = fixed_signs(b)
    return Cut(rank, kept, lost, b * signs, a * signs[:, None])


def _gram_svd(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, σ, Vh) of a float64 matrix; singular values below 1e-8 of the largest, which float32 data does not
    have, count as zero.
    """
    if w.shape[0] > w.shape[1]:
        v, sigma, uh = _gram_svd(w.T)
        return uh.T, sigma, v.T
    energies, u = torch.linalg.eigh(w @ w.T)
    sigma, u = energies.flip(0).clamp(min=0).sqrt(), u.flip(1)
    sigma = torch.where(sigma > 1e-8 * sigma[0], sigma, torch.zeros_like(sigma))
    inverse = torch.where(sigma > 0, 1 / sigma, torch.zeros_like(sigma))
    return u, sigma, inverse[:, None] * (u.T @ w)


def _krylov_svd(w: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U, σ, Vh) of W seen from the block Krylov space of W·Wᵀ: at least the first `rank` are those of W."""
    width, whole = rank + OVERSAMPLE, float(torch.linalg.vector_norm(w)) ** 2
    start = torch.randn(w.shape[1], width, generator=torch.Generator().manual_seed(0)).to(w)
    block = torch.linalg.qr(w @ start).Q
    basis, seen, before = block, block.T @ w, -1.0
    for _ in range(MAX_STEPS):
        sigma = torch.linalg.eigvalsh((seen @ seen.T).to(torch.float64)).flip(0)[:rank]
        energy = float(sigma.sum())
        if energy - before <= SETTLED * whole or basis.shape[1] + width > min(w.shape):
            break
        before = energy
        block = w @ seen[-width:].T
        for _ in range(2):  # once more, for what rounding left
            block = block - basis @ (basis.T @ block)
            block = torch.linalg.qr(block).Q
        basis, seen = torch.cat([basis, block], dim=1), torch.cat([seen, block.T @ w])
    u, sigma, vh = torch.linalg.svd(seen.to(torch.float64), full_matrices=False)
    return basis.to(torch.float64) @ u, sigma, vh
