"""Low-rank linear algebra on factors; the product B·A is never formed."""

import torch
from torch import Tensor


def gram_inner(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> float:
    """⟨B1·A1, B2·A2⟩ (Frobenius), from the Gram matrices of the factors, in float64."""
    left = b1.double().T @ b2.double()
    right = a1.double() @ a2.double().T
    return float((left * right).sum())


def compress(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best rank-`rank` factors of B·A, batched over a leading dimension, in float64.

    `b` [n, d_out, R], `a` [n, R, d_in] → `b` [n, d_out, rank], `a` [n, rank, d_in], and all singular values
    [n, min(R, d_out, d_in)]. QR of both factors, SVD of the R×R core; each singular value is split evenly
    and signs are fixed so that the largest entry of every left vector is positive.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().transpose(-1, -2))
    u, s, vh = torch.linalg.svd(r_b @ r_a.transpose(-1, -2), full_matrices=False)
    left = q_b @ u[..., :rank]
    right = vh[..., :rank, :] @ q_a.transpose(-1, -2)
    peak = left.abs().argmax(dim=-2, keepdim=True)
    sign = torch.sign(left.gather(-2, peak))
    sign[sign == 0] = 1
    root = s[..., :rank].sqrt().unsqueeze(-2)
    return left * sign * root, right * (sign * root).transpose(-1, -2), s
