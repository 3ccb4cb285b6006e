"""What a method makes of one module's weighted updates while they stay low-rank.

A part is (weight, factors); every function takes the module's parts and returns parts whose weighted sum is
the method's update, exactly. Formulas need norms, inner products and projections only, which Gram matrices
and QR of the factors give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.adapter import LoraAdapter, LoraModule
from adapters.algebra.consensus import CONSENSUS
from adapters.algebra.lowrank import fixed_signs, inner
from adapters.algebra.sparsify import SPARSIFY, Draw
from adapters.recipes.method import Method, Value


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter's update of one module at its weight there."""

    name: str
    adapter: LoraAdapter
    weight: float
    module: LoraModule

    @property
    def factor(self) -> float:
        """Weight times scaling: what B·A is multiplied by."""
        return self.weight * self.module.scaling


@dataclass(frozen=True, slots=True)
class Context:
    """What a method knows besides the parts: the module's name, its own row, options and role adapters."""

    module: str
    method: Method
    options: Mapping[str, Value]
    roles: Mapping[str, LoraModule | None]
    device: torch.device | str | None

    def draw(self, part: Part, factor: str = "") -> Draw:
        """The random numbers of that part's update here."""
        return Draw(int(self.options.get("seed", 0)), part.adapter.digest, self.module + factor)

    def sparse(self, update: Tensor, draw: Draw) -> Tensor:
        """`update` by the row's sparsifier."""
        return SPARSIFY[self.method.sparsify](update, draw, self.options)

    def settle(self, updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The row's consensus."""
        return CONSENSUS[self.method.consensus](updates, weights, str(self.options.get("majority", "total")))


Combine = Callable[[Sequence[Part], Context], list[tuple[float, LoraModule]]]
_WIDE = torch.float64


def add(parts: Sequence[Part], context: Context) -> list[tuple[float, LoraModule]]:
    """The plain weighted sum."""
    return [(part.weight, part.module) for part in parts]


def slerp(parts: Sequence[Part], context: Context) -> list[tuple[float, LoraModule]]:
    """sin((1−t)θ)/sin θ·u + sin(tθ)/sin θ·v, θ the angle between the weighted updates u (`from`) and v.

    Straight where the angle is not defined or its sine too small; an update that lacks the module is zero.
    """
    t = float(context.options["t"])
    start = next((part for part in parts if part.name == context.options["from"]), None)
    end = next((part for part in parts if part is not start), None)
    first, second = 1 - t, t
    if start is not None and end is not None:
        norms = math.sqrt(_product(start, start) * _product(end, end))
        cosine = max(-1.0, min(1.0, _product(start, end) / norms)) if norms else 1.0
        angle = math.acos(cosine)
        if math.sin(angle) > 1e-6:
            first, second = (math.sin(share * angle) / math.sin(angle) for share in (1 - t, t))
    found = [(share * part.weight, part.module) for share, part in ((first, start), (second, end)) if part is not None]
    return [(weight, module) for weight, module in found if weight != 0.0]


def _product(one: Part, two: Part) -> float:
    return one.factor * two.factor * inner(one.module.b, one.module.a, two.module.b, two.module.a)


def safe_merge(parts: Sequence[Part], context: Context) -> list[tuple[float, LoraModule]]:
    """Where cos(ΔW, P·ΔW) < threshold, P the projection onto the safety update's column space:
    (1 − share)·ΔW + share·ΔW_safety; elsewhere ΔW.
    """
    plain, safety = add(parts, context), context.roles["safety"]
    if safety is None or not plain or alignment(parts, safety) >= float(context.options["threshold"]):
        return plain
    share = float(context.options["share"])
    return [*((weight * (1 - share), module) for weight, module in plain), (share, safety)]


def safe_project(parts: Sequence[Part], context: Context) -> list[tuple[float, LoraModule]]:
    """Where cos(ΔW, P·ΔW) < threshold (everywhere at threshold 1): P·ΔW, P the projection onto the
    direction's column space. A direction that lacks the module leaves nothing of it.
    """
    threshold, direction = float(context.options["threshold"]), context.roles["direction"]
    if not parts or (direction is None and threshold == 0):
        return add(parts, context)
    if direction is None:
        return []
    if threshold < 1 and alignment(parts, direction) >= threshold:
        return add(parts, context)
    basis = column_space(direction)
    found = []
    for part in parts:
        b = basis @ (basis.T @ part.module.b.to(basis))
        found.append((part.weight, LoraModule(part.module.a, b, part.module.scaling)))
    return found


def alignment(parts: Sequence[Part], direction: LoraModule) -> float:
    """cos(ΔW, P·ΔW) = ‖P·ΔW‖ / ‖ΔW‖ of the parts' sum, P the projection onto `direction`'s column space;
    1 for a sum of zero.
    """
    basis = column_space(direction)
    b = torch.cat([part.module.b.to(basis) * part.factor for part in parts], dim=1)
    a = torch.cat([part.module.a.to(basis) for part in parts])
    whole, projected = inner(b, a, b, a), inner(basis.T @ b, a, basis.T @ b, a)
    return math.sqrt(max(0.0, projected) / whole) if whole > 0 else 1.0


def column_space(module: LoraModule) -> Tensor:
    """Orthonormal basis of the update's column space, d_out×k, float64."""
    q_b, r_b = torch.linalg.qr(module.b.to(_WIDE))
    r_a = torch.linalg.qr(module.a.to(_WIDE).T).R
    u, sigma, _ = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    floor = torch.finfo(_WIDE).eps * max(module.shape) * float(sigma[0])
    basis: Tensor = q_b @ u[:, sigma > floor]
    return basis


def knots(parts: Sequence[Part], context: Context) -> list[tuple[float, LoraModule]]:
    """[ΔW₁ … ΔWₙ] = U·Σ·[V₁ … Vₙ]; TIES on the coordinates Σ·Vᵢ (k×d_in); back through U.

    Each ΔWᵢ = s·Bᵢ·Aᵢ enters without its weight. U comes from QR of the B's and SVD of a k×k core.
    """
    if not parts:
        return []
    b = torch.cat([part.module.b.to(context.device, _WIDE) * part.module.scaling for part in parts], dim=1)
    q_b, r_b = torch.linalg.qr(b)
    right = [torch.linalg.qr(part.module.a.to(context.device, _WIDE).T) for part in parts]
    blocks = torch.zeros(b.shape[1], sum(r.shape[0] for _, r in right), dtype=_WIDE, device=b.device)
    row = column = 0
    for part, (_, r) in zip(parts, right, strict=True):
        blocks[row : row + part.module.rank, column : column + r.shape[0]] = r.T
        row, column = row + part.module.rank, column + r.shape[0]
    core = r_b @ blocks
    u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
    kept = sigma > torch.finfo(_WIDE).eps * max(b.shape) * float(sigma[0])
    if not bool(kept.any()):
        return []
    basis = q_b @ u[:, kept]
    signs = fixed_signs(basis)  # else a tied vote, which is positive, would fall as the SVD's signs do
    scaled = signs[:, None] * (sigma[:, None] * vh)[kept]
    widths = [r.shape[0] for _, r in right]
    coordinates = [block @ q.T for block, (q, _) in zip(scaled.split(widths, dim=1), right, strict=True)]
    sparse = [context.sparse(c, context.draw(part)) for c, part in zip(coordinates, parts, strict=True)]
    merged = context.settle(sparse, [part.weight for part in parts])
    return [(1.0, LoraModule(merged, basis * signs, 1.0))]


def apart(parts: Sequence[Part], context: Context) -> list[tuple[float, LoraModule]]:
    """PEFT's way: A and B are merged as if each were an update, at the square root of weight times scaling,
    the sign on A's side. Factors of lower rank are filled up with zeros.
    """
    if not parts:
        return []
    rank = max(part.module.rank for part in parts)
    roots = [math.sqrt(abs(part.factor)) for part in parts]
    signed = [math.copysign(root, part.factor) for root, part in zip(roots, parts, strict=True)]
    tall, wide = [], []
    for part in parts:
        dtype = torch.promote_types(torch.promote_types(part.module.a.dtype, part.module.b.dtype), torch.float32)
        missing = rank - part.module.rank
        a = torch.nn.functional.pad(part.module.a.to(context.device, dtype), (0, 0, 0, missing))
        b = torch.nn.functional.pad(part.module.b.to(context.device, dtype), (0, missing))
        wide.append(context.sparse(a, context.draw(part, ".lora_A")))
        tall.append(context.sparse(b, context.draw(part, ".lora_B")))
    return [(1.0, LoraModule(context.settle(wide, signed), context.settle(tall, roots), 1.0))]


COMBINE: Mapping[str, Combine] = {
    "sum": add,
    "slerp": slerp,
    "safe_merge": safe_merge,
    "safe_project": safe_project,
    "knots": knots,
}
