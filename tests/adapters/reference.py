"""Every method written plainly on dense float64 matrices, for the package to agree with.

Written from the papers' formulas, entry by entry where that is the clearest; slow, and independent of the
package but for its random numbers (`Draw`), without which no mask could be compared.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapters import LoraAdapter, Recipe
from adapters.algebra.sparsify import Draw
from adapters.recipes.weights import layer_range, weights_at

Dense = dict[str, Tensor]


def delta(adapter: LoraAdapter, module: str) -> Tensor:
    """s·B·A in float64."""
    found = adapter.modules[module]
    return found.scaling * (found.b.double() @ found.a.double())


def weighted(recipe: Recipe, family: Mapping[str, LoraAdapter], module: str) -> list[tuple[str, float, Tensor]]:
    """(name, weight, ΔW) of the terms that have the module, zero weights left out."""
    layers = layer_range(key for name in recipe.adapters for key in family[name].modules)
    found = []
    for name, weight in recipe.weights.items():
        if module in family[name].modules and (value := weights_at(weight, [module], layers)[module]) != 0:
            found.append((name, value, delta(family[name], module)))
    return found


def top(update: Tensor, count: int) -> Tensor:
    """The `count` entries of largest magnitude; zeros elsewhere."""
    order = update.abs().reshape(-1).argsort(descending=True, stable=True)
    kept = torch.zeros_like(update).reshape(-1)
    kept[order[:count]] = update.reshape(-1)[order[:count]]
    return kept.reshape(update.shape)


def sparse(kind: str, update: Tensor, draw: Draw, options: Mapping[str, float]) -> Tensor:
    """One update made sparse."""
    density, total = float(options.get("density", 1.0)), update.numel()
    if density >= 1:
        return update
    if kind == "magnitude":
        return top(update, int(density * total))
    chance = draw.uniform(update)
    if kind == "random":
        return torch.where(chance < density, update / density, 0)
    if kind == "breadcrumbs":
        kept = int(density * total)
        dropped = min(int(options["gamma"] * total), total - kept)
        return top(update, kept + dropped) - top(update, dropped)
    assert kind == "magprune"
    spread = min(options["epsilon"], 1 - density, density / 2)
    out = torch.zeros_like(update)
    for i, row in enumerate(update):
        order = row.abs().argsort(stable=True).tolist()
        for rank, j in enumerate(order):
            keep = density - spread + 2 * spread * rank / max(1, len(order) - 1)
            if chance[i, j] < torch.tensor(keep):
                out[i, j] = row[j] / keep
    return out


def elected(updates: Sequence[Tensor], weights: Sequence[float], majority: str) -> Tensor:
    """TIES: sign election and disjoint mean, entry by entry."""
    shape = updates[0].shape
    flat, out = [update.reshape(-1).tolist() for update in updates], []
    for entries in zip(*flat, strict=True):
        turned = [math.copysign(1, w) * x for w, x in zip(weights, entries, strict=True)]
        votes = sum(turned) if majority == "total" else sum((x > 0) - (x < 0) for x in turned)
        agreeing = [w * x for w, x, t in zip(weights, entries, turned, strict=True) if (t > 0 if votes >= 0 else t < 0)]
        out.append(sum(agreeing) / max(1, len(agreeing)))
    return torch.tensor(out, dtype=torch.float64).reshape(shape)


def best(update: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank."""
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    approximation: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return approximation


SPARSIFIER = {"ties": "magnitude", "dare_linear": "random", "dare_ties": "random", "magnitude_prune": "magnitude"}
SPARSIFIER |= {"della": "magprune", "breadcrumbs": "breadcrumbs"}
ELECTING = ("ties", "dare_ties", "della")


def on_update(recipe: Recipe, family: Mapping[str, LoraAdapter], module: str, options: Mapping[str, object]) -> Tensor:
    """ties, dare_linear, dare_ties, magnitude_prune, della, breadcrumbs, before any cut."""
    terms = weighted(recipe, family, module)
    numbers = {name: float(value) for name, value in options.items() if isinstance(value, int | float)}
    updates = []
    for name, _, update in terms:
        draw = Draw(int(numbers.get("seed", 0)), family[name].digest, module)
        updates.append(sparse(SPARSIFIER[recipe.method], update, draw, numbers))
    weights = [weight for _, weight, _ in terms]
    if recipe.method in ELECTING:
        return elected(updates, weights, str(options["majority"]))
    return sum((w * u for w, u in zip(weights, updates, strict=True)), torch.zeros_like(updates[0]))


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Shoemake's formula on two matrices seen as vectors."""
    if not first.any() or not second.any():
        return (1 - t) * first + t * second
    cosine = float((first * second).sum() / (first.norm() * second.norm()))
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) <= 1e-6:
        return (1 - t) * first + t * second
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


def projector(direction: Tensor) -> Tensor:
    """Orthogonal projection onto the column space."""
    u, s, _ = torch.linalg.svd(direction, full_matrices=False)
    basis = u[:, s > 1e-10 * s.max()] if s.max() > 0 else u[:, :0]
    projection: Tensor = basis @ basis.T
    return projection


def cosine(one: Tensor, two: Tensor) -> float:
    """Of two matrices seen as vectors; 1 when one is zero."""
    norms = float(one.norm() * two.norm())
    return float((one * two).sum()) / norms if norms else 1.0


def knots(updates: Sequence[Tensor], weights: Sequence[float], density: float, majority: str) -> Tensor:
    """KnOTS with TIES: the SVD of the updates side by side, TIES on Σ·V of each, back through U."""
    u, s, vh = torch.linalg.svd(torch.cat(list(updates), dim=1), full_matrices=False)
    kept = s > 1e-10 * s.max()
    u, vh = u[:, kept], vh[kept]
    for i in range(u.shape[1]):  # the sign of a singular vector is free; a tied vote is not
        if u[u[:, i].abs().argmax(), i] < 0:
            u[:, i], vh[i] = -u[:, i], -vh[i]
    pieces = (s[kept, None] * vh).split(updates[0].shape[1], dim=1)
    if density < 1:
        pieces = tuple(top(piece, int(density * piece.numel())) for piece in pieces)
    merged: Tensor = u @ elected(pieces, weights, majority)
    return merged
