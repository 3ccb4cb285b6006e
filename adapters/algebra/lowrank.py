"""Linear algebra on factors: B·A is formed only when a method needs the dense update. Batched over modules of one
shape; in float64, except for large dense updates, which stay in their own dtype.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

DOUBLE = torch.float64
MAX_CONDITION = 1e4
"""Up to this condition number (1-norm, of the factor with unit columns) CholeskyQR loses at most its square
times 1e-16 of orthogonality, 1e-8; beyond it Householder QR is used.
"""
OVERSAMPLE = 10
MAX_STEPS = 40
KRYLOV_TOLERANCE = 1e-7
"""The Krylov space grows until a step adds less than this share of ‖W‖² to what the best rank keeps."""
SMALL = 1e-20
"""Sums of squares from here to its inverse are far from the ends of float32."""
DENSE_LIMIT = 1024
"""Up to this many rows or columns the eigenvectors of the Gram matrix are as fast."""


class FactorPair(NamedTuple):
    """The update B·A: `b` d_out×k and `a` k×d_in, or n of them, n×d_out×k and n×k×d_in."""

    b: Tensor
    a: Tensor


@dataclass(frozen=True, slots=True)
class Truncation:
    """One module's best approximation of a rank: the squared norm kept and lost, and the factors, each carrying the
    square root of the singular values, if they were asked for.
    """

    rank: int
    kept_energy: float
    lost_energy: float
    factors: FactorPair | None


def inner(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> float:
    """⟨B1·A1, B2·A2⟩ (Frobenius) in float64, as the sum of (B1ᵀ·B2)∘(A1·A2ᵀ)."""
    left = b1.to(DOUBLE).T @ b2.to(DOUBLE)
    right = a1.to(DOUBLE) @ a2.to(DOUBLE).T
    return float((left * right).sum())


@dataclass(frozen=True, slots=True)
class GramFactors:
    """Updates B·diag(scale)·A of n modules of one shape: `b` n×d_out×k, `a` n×k×d_in, float32 or float64, `scale`
    n×1×k float64. Their Gram matrices are float64 and taken module by module, in the processor's cache.
    """

    b: Tensor
    a: Tensor
    scale: Tensor
    gram_b: Tensor
    gram_a: Tensor

    @classmethod
    def compute(cls, b: Tensor, a: Tensor, scale: Tensor | None = None) -> Self:
        """The factors with their Gram matrices BᵀB and A·Aᵀ, n×k×k; without `scale`, ones."""
        ones = torch.ones(len(b), 1, b.shape[-1], dtype=DOUBLE, device=b.device)
        return cls(b, a, ones if scale is None else scale, _gram(b), _gram(a.mT))


def inner_products(b: Tensor, a: Tensor) -> Tensor:
    """⟨bᵢ·aᵢ, bⱼ·aⱼ⟩ of the columns of `b` (n×d_out×k) and rows of `a` (n×k×d_in), n×k×k float64, good to the
    rounding of the factors' own dtype: enough to report norms and cosines, and much faster than in float64.
    """
    return _quick_gram(b) * _quick_gram(a.mT)


def _gram(x: Tensor) -> Tensor:
    """xᵀx of n×d×k, n×k×k float64."""
    buffer = torch.empty_like(x[0], dtype=DOUBLE)
    return torch.stack([buffer.copy_(module).mT @ buffer for module in x])


def _quick_gram(x: Tensor) -> Tensor:
    """xᵀx in x's own dtype, as float64, unless its squares are too large or too small for that."""
    gram = x.mT @ x
    low, high = torch.aminmax(gram.diagonal(dim1=-2, dim2=-1))
    return gram.to(DOUBLE) if low > SMALL and high < 1 / SMALL else _gram(x)


def cholesky_qr(gram: Tensor) -> tuple[Tensor, Tensor] | None:
    """(R, R⁻¹), n×k×k, with x·R⁻¹ orthonormal for the x of which n×k×k `gram` is xᵀx in float64; None where the
    columns of any of the n are too dependent for it (MAX_CONDITION).

    The columns are brought to unit length first. https://doi.org/10.1137/18M1218212 bounds the loss.
    """
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    if not bool((length > 0).all()):
        return None
    factor, failed = torch.linalg.cholesky_ex(gram / (length[..., :, None] * length[..., None, :]), upper=True)
    if bool(failed.any()):
        return None
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(factor)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=True)
    condition = torch.linalg.matrix_norm(factor, ord=1) * torch.linalg.matrix_norm(inverse, ord=1)
    if not bool((condition <= MAX_CONDITION).all()):
        return None
    return factor * length[..., None, :], inverse / length[..., :, None]


class Decomposition(NamedTuple):
    """n updates as left·U·diag(σ)·Vh·right, where left·U and Vh·right are orthonormal and σ (n×k) is descending; all
    but `left` and `right` float64.
    """

    left: Tensor
    u: Tensor
    sigma: Tensor
    vh: Tensor
    right: Tensor


def decompose(x: GramFactors) -> Decomposition:
    """The singular value decomposition of every B·diag(scale)·A, which is not formed: by CholeskyQR of the factors
    where it is safe, else by Householder QR.
    """
    tall, wide = cholesky_qr(x.gram_b * x.scale * x.scale.mT), cholesky_qr(x.gram_a)
    if tall is None or wide is None:
        q_b, r_b = torch.linalg.qr(x.b.to(DOUBLE) * x.scale)
        q_a, r_a = torch.linalg.qr(x.a.to(DOUBLE).mT)
        u, sigma, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        return Decomposition(q_b, u, sigma, vh, q_a.mT)
    (r_b, inverse_b), (r_a, inverse_a) = tall, wide
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return Decomposition(x.b, x.scale.mT * (inverse_b @ u), sigma, vh @ inverse_a.mT, x.a)


def truncate(x: GramFactors, limit: int, *, build: bool = True) -> list[Truncation]:
    """The best approximation of every B·diag(scale)·A of rank at most `limit` (Eckart and Young 1936).

    An orthogonal basis of both factors leaves a core of at most k×k whose singular values are those of the
    product. Directions below rounding (of the factors' norms) count as zero and are dropped first, at no loss.
    With `build` False the factors are not computed; the numbers are the same to the last bit.
    """
    left, u, sigma, vh, right = decompose(x)
    size = max(x.b.shape[-2], x.a.shape[-1], x.b.shape[-1])
    norm_b = (x.gram_b.diagonal(dim1=-2, dim2=-1) * x.scale[:, 0].square()).sum(-1).sqrt()
    norm_a = x.gram_a.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()
    floor = torch.finfo(DOUBLE).eps * size * norm_b * norm_a
    sigma = torch.where(sigma > floor[:, None], sigma, torch.zeros_like(sigma))
    counts, energies, half = (sigma > 0).sum(dim=-1).tolist(), sigma.square(), sigma.sqrt()
    cuts = []
    for i, count in enumerate(counts):
        rank = min(limit, max(1, count))
        kept, lost = float(energies[i, :rank].sum()), float(energies[i, rank:].sum())
        if not build:
            cuts.append(Truncation(rank, kept, lost, None))
            continue
        tall = left[i].to(DOUBLE) @ (u[i, :, :rank] * half[i, :rank])
        signs = choose_signs(tall)
        flat = (signs * half[i, :rank])[:, None] * vh[i, :rank]
        cuts.append(
            Truncation(rank, kept, lost, FactorPair((tall * signs).to(x.b), (flat @ right[i].to(DOUBLE)).to(x.a)))
        )
    return cuts


def choose_signs(left: Tensor) -> Tensor:
    """±1 per column of `left`, so that its entry of largest magnitude becomes positive: one of the many
    equal decompositions.
    """
    ones = torch.ones_like(left[0])
    return torch.where(-left.amin(dim=0) > left.amax(dim=0), -ones, ones)


def truncate_dense(w: Tensor, limit: int, *, build: bool = True) -> Truncation:
    """The best approximation of a dense d_out×d_in matrix of rank at most `limit`.

    Large matrices: a block Krylov space (https://arxiv.org/abs/1504.05477), grown until another step adds less
    than KRYLOV_TOLERANCE of ‖W‖² to the energy kept, then the SVD of W seen from it. The start is fixed, so the same
    matrix gives the same answer.
    """
    if not bool(torch.linalg.vector_norm(w) > 0):
        return Truncation(1, 0.0, 0.0, FactorPair(w.new_zeros(w.shape[0], 1), w.new_zeros(1, w.shape[1])))
    is_small = min(w.shape) <= max(DENSE_LIMIT, 4 * limit)
    u, sigma, vh = _gram_svd(w.to(DOUBLE)) if is_small else _krylov_svd(w, limit)
    rank = min(limit, max(1, int((sigma > 0).sum())))
    energies, half = sigma.square(), sigma[:rank].sqrt()
    kept, b, a = float(energies[:rank].sum()), u[:, :rank] * half, vh[:rank] * half[:, None]
    if is_small:
        lost = float(energies[rank:].sum())
    else:  # the rest of the spectrum is not known
        lost = float(torch.linalg.vector_norm(torch.addmm(w, b.to(w), a.to(w), alpha=-1))) ** 2
    if not build:
        return Truncation(rank, kept, lost, None)
    signs = choose_signs(b)
    return Truncation(rank, kept, lost, FactorPair(b * signs, a * signs[:, None]))


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
    width, total = rank + OVERSAMPLE, float(torch.linalg.vector_norm(w)) ** 2
    start = torch.randn(w.shape[1], width, generator=torch.Generator().manual_seed(0)).to(w)
    block = torch.linalg.qr(w @ start).Q
    basis, projected, previous = block, block.T @ w, -1.0
    for _ in range(MAX_STEPS):
        sigma = torch.linalg.eigvalsh((projected @ projected.T).to(DOUBLE)).flip(0)[:rank]
        energy = float(sigma.sum())
        if energy - previous <= KRYLOV_TOLERANCE * total or basis.shape[1] + width > min(w.shape):
            break
        previous = energy
        block = w @ projected[-width:].T
        for _ in range(2):  # a second time for what rounding left
            block = block - basis @ (basis.T @ block)
            block = torch.linalg.qr(block).Q
        basis, projected = torch.cat([basis, block], dim=1), torch.cat([projected, block.T @ w])
    u, sigma, vh = _gram_svd(projected.to(DOUBLE))
    return basis.to(DOUBLE) @ u, sigma, vh
