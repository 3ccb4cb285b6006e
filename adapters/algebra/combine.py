"""What a method makes of one module's weighted updates while they stay low-rank.

Every function takes the module's updates and returns (weight, factors) pairs whose weighted sum is the method's
update, exactly. Formulas need norms, inner products and projections only, which Gram matrices and QR of the factors
give.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.adapter import LoraAdapter, LoraModule
from adapters.algebra.consensus import CONSENSUS
from adapters.algebra.lowrank import DOUBLE, choose_signs, inner
from adapters.algebra.sparsify import SPARSIFY, Draw
from adapters.recipes.method import Method, Value


@dataclass(frozen=True, slots=True)
class WeightedUpdate:
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
    """What a method knows besides the updates: the module's name, its own row, options and role adapters."""

    module: str
    method: Method
    options: Mapping[str, Value]
    roles: Mapping[str, LoraModule | None]
    device: torch.device | str | None

    def draw(self, update: WeightedUpdate, factor: str = "") -> Draw:
        """The random numbers of an adapter's update here, or of one of its factors."""
        return Draw(int(self.options.get("seed", 0)), update.adapter.digest, self.module + factor)

    def sparsify(self, update: Tensor, draw: Draw) -> Tensor:
        """`update` made sparse as the method's row says."""
        return SPARSIFY[self.method.sparsify](update, draw, self.options)

    def merge(self, updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """One update of several, by the consensus of the method's row."""
        return CONSENSUS[self.method.consensus](updates, weights, str(self.options.get("majority", "total")))


Combine = Callable[[Sequence[WeightedUpdate], Context], list[tuple[float, LoraModule]]]


def add(updates: Sequence[WeightedUpdate], context: Context) -> list[tuple[float, LoraModule]]:
    """The plain weighted sum."""
    return [(update.weight, update.module) for update in updates]


def slerp(updates: Sequence[WeightedUpdate], context: Context) -> list[tuple[float, LoraModule]]:
    """sin((1−t)θ)/sin θ·u + sin(tθ)/sin θ·v, θ the angle between the weighted updates u (`from`) and v.

    Straight where the angle is not defined or its sine too small; an update that lacks the module is zero.
    """
    t = float(context.options["t"])
    start = next((update for update in updates if update.name == context.options["from"]), None)
    end = next((update for update in updates if update is not start), None)
    first, second = 1 - t, t
    if start is not None and end is not None:
        norms = math.sqrt(_product(start, start) * _product(end, end))
        cosine = max(-1.0, min(1.0, _product(start, end) / norms)) if norms else 1.0
        angle = math.acos(cosine)
        if math.sin(angle) > 1e-6:
            first, second = (math.sin(share * angle) / math.sin(angle) for share in (1 - t, t))
    shares = ((first, start), (second, end))
    terms = [(share * update.weight, update.module) for share, update in shares if update is not None]
    return [(weight, module) for weight, module in terms if weight != 0.0]


def _product(one: WeightedUpdate, two: WeightedUpdate) -> float:
    return one.factor * two.factor * inner(one.module.b, one.module.a, two.module.b, two.module.a)


def safe_merge(updates: Sequence[WeightedUpdate], context: Context) -> list[tuple[float, LoraModule]]:
    """Where cos(ΔW, P·ΔW) < threshold, P the projection onto the safety update's column space:
    (1 − share)·ΔW + share·ΔW_safety; elsewhere ΔW.
    """
    plain, safety = add(updates, context), context.roles["safety"]
    if safety is None or not plain or alignment(updates, safety) >= float(context.options["threshold"]):
        return plain
    share = float(context.options["share"])
    return [*((weight * (1 - share), module) for weight, module in plain), (share, safety)]


def safe_project(updates: Sequence[WeightedUpdate], context: Context) -> list[tuple[float, LoraModule]]:
    """Where cos(ΔW, P·ΔW) < threshold (everywhere at threshold 1): P·ΔW, P the projection onto the
    direction's column space. A direction that lacks the module leaves nothing of it.
    """
    threshold, direction = float(context.options["threshold"]), context.roles["direction"]
    if not updates or (direction is None and threshold == 0):
        return add(updates, context)
    if direction is None:
        return []
    if threshold < 1 and alignment(updates, direction) >= threshold:
        return add(updates, context)
    basis = column_space(direction)
    projected = []
    for update in updates:
        b = basis @ (basis.T @ update.module.b.to(basis))
        projected.append((update.weight, LoraModule(update.module.a, b, update.module.scaling)))
    return projected


def alignment(updates: Sequence[WeightedUpdate], direction: LoraModule) -> float:
    """cos(ΔW, P·ΔW) = ‖P·ΔW‖ / ‖ΔW‖ of the updates' sum, P the projection onto `direction`'s column space;
    1 for a sum of zero.
    """
    basis = column_space(direction)
    b = torch.cat([update.module.b.to(basis) * update.factor for update in updates], dim=1)
    a = torch.cat([update.module.a.to(basis) for update in updates])
    whole, projected = inner(b, a, b, a), inner(basis.T @ b, a, basis.T @ b, a)
    return math.sqrt(max(0.0, projected) / whole) if whole > 0 else 1.0


def column_space(module: LoraModule) -> Tensor:
    """Orthonormal basis of the update's column space, d_out×k, float64."""
    q_b, r_b = torch.linalg.qr(module.b.to(DOUBLE))
    r_a = torch.linalg.qr(module.a.to(DOUBLE).T).R
    u, sigma, _ = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    floor = torch.finfo(DOUBLE).eps * max(module.shape) * float(sigma[0])
    basis: Tensor = q_b @ u[:, sigma > floor]
    return basis


def knots(updates: Sequence[WeightedUpdate], context: Context) -> list[tuple[float, LoraModule]]:
    """[ΔW₁ … ΔWₙ] = U·Σ·[V₁ … Vₙ]; TIES on the coordinates Σ·Vᵢ (k×d_in); back through U.

    Each ΔWᵢ = s·Bᵢ·Aᵢ enters without its weight. U comes from QR of the B's and SVD of a k×k core.
    """
    if not updates:
        return []
    # The left singular vectors of all updates side by side, by QR of the factors.
    b = torch.cat([update.module.b.to(context.device, DOUBLE) * update.module.scaling for update in updates], dim=1)
    q_b, r_b = torch.linalg.qr(b)
    right = [torch.linalg.qr(update.module.a.to(context.device, DOUBLE).T) for update in updates]
    blocks = torch.zeros(b.shape[1], sum(r.shape[0] for _, r in right), dtype=DOUBLE, device=b.device)
    row = column = 0
    for update, (_, r) in zip(updates, right, strict=True):
        blocks[row : row + update.module.rank, column : column + r.shape[0]] = r.T
        row, column = row + update.module.rank, column + r.shape[0]
    u, sigma, vh = torch.linalg.svd(r_b @ blocks, full_matrices=False)
    nonzero = sigma > torch.finfo(DOUBLE).eps * max(b.shape) * float(sigma[0])
    if not bool(nonzero.any()):
        return []
    basis = q_b @ u[:, nonzero]
    # Fixed signs: a tied vote counts as positive, so it would otherwise go as the SVD's arbitrary signs do.
    signs = choose_signs(basis)
    scaled = signs[:, None] * (sigma[:, None] * vh)[nonzero]
    # TIES on each update's coordinates in that basis.
    widths = [r.shape[0] for _, r in right]
    coordinates = [block @ q.T for block, (q, _) in zip(scaled.split(widths, dim=1), right, strict=True)]
    sparse = [context.sparsify(c, context.draw(update)) for c, update in zip(coordinates, updates, strict=True)]
    merged = context.merge(sparse, [update.weight for update in updates])
    return [(1.0, LoraModule(merged, basis * signs, 1.0))]


COMBINE: Mapping[str, Combine] = {
    "sum": add,
    "slerp": slerp,
    "safe_merge": safe_merge,
    "safe_project": safe_project,
    "knots": knots,
}
