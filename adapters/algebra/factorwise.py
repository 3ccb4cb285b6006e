"""PEFT's approach: A and B are merged as if each were an update, which only approximates the weighted sum."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from adapters.adapter import LoraModule
from adapters.algebra.bound import Batch, BoundRecipe
from adapters.algebra.combine import WeightedUpdate
from adapters.algebra.exact import fuse_sums
from adapters.algebra.factors import LowRankSum
from adapters.algebra.result import ModuleResult


def fuse_batch(bound: BoundRecipe, batch: Batch, *, build: bool) -> list[ModuleResult]:
    """The results of a batch, in its order, with their departure from the exact weighted sum."""
    distances: list[tuple[float, float]] = []

    def merge_all() -> Iterator[LowRankSum]:
        for name, parents in batch.parents.items():
            merged = _merge(bound, name, parents)
            distances.append(_measure_departure(merged, bound.nonzero_terms(parents)))
            yield merged

    results = fuse_sums(bound, batch, merge_all(), build=build)
    return [
        replace(result, departure=departure, reference=reference)
        for result, (departure, reference) in zip(results, distances, strict=True)
    ]


def compute_energies(bound: BoundRecipe, name: str, parents: Sequence[WeightedUpdate]) -> Tensor:
    """Squared singular values of the module's update before any truncation, descending, float64."""
    return _merge(bound, name, parents).energies(bound.device)


def _merge(bound: BoundRecipe, name: str, parents: Sequence[WeightedUpdate]) -> LowRankSum:
    """Merge A and B separately, each scaled by √|weight·scaling|, the sign on A; zero-pad lower ranks."""
    terms, context = bound.nonzero_terms(parents), bound.context(name, parents)
    if not terms:
        return LowRankSum(bound.shapes[name], ())
    rank = max(term.module.rank for term in terms)
    roots = [math.sqrt(abs(term.factor)) for term in terms]
    signed = [math.copysign(root, term.factor) for root, term in zip(roots, terms, strict=True)]
    all_a, all_b = [], []
    for term in terms:
        dtype, missing = term.module.compute_dtype, rank - term.module.rank
        a = torch.nn.functional.pad(term.module.a.to(context.device, dtype), (0, 0, 0, missing))
        b = torch.nn.functional.pad(term.module.b.to(context.device, dtype), (0, missing))
        all_a.append(context.sparsify(a, context.draw(term, ".lora_A")))
        all_b.append(context.sparsify(b, context.draw(term, ".lora_B")))
    merged = LoraModule(context.merge(all_a, signed), context.merge(all_b, roots), 1.0)
    return LowRankSum(bound.shapes[name], ((1.0, merged),))


def _measure_departure(merged: LowRankSum, terms: Sequence[WeightedUpdate]) -> tuple[float, float]:
    """(‖merged − sum‖², ‖sum‖²) for the exact weighted sum."""
    plain = LowRankSum(merged.shape, tuple((term.weight, term.module) for term in terms))
    negated = tuple((-weight, module) for weight, module in plain.terms)
    return LowRankSum(merged.shape, (*merged.terms, *negated)).square(), plain.square()
