"""Methods that stay low-rank: exact before the rank limit, the best approximation at it."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from adapters.algebra.bound import Batch, BoundRecipe
from adapters.algebra.combine import COMBINE, WeightedUpdate
from adapters.algebra.factors import LowRankSum, build_sums
from adapters.algebra.lowrank import DOUBLE, FactorPair, GramFactors, inner_products, truncate
from adapters.algebra.result import ModuleResult
from adapters.algebra.similarity import compare_batch, compare_parents


def fuse_batch(bound: BoundRecipe, batch: Batch, *, build: bool) -> list[ModuleResult]:
    """The results of a batch, in its order."""
    if all(bound.is_plain(parents) for parents in batch.parents.values()):
        return _fuse_plain(bound, batch, build=build)
    sums = (_combine(bound, name, parents) for name, parents in batch.parents.items())
    return fuse_sums(bound, batch, sums, build=build)


def compute_energies(bound: BoundRecipe, name: str, parents: Sequence[WeightedUpdate]) -> Tensor:
    """Squared singular values of the module's update before any truncation, descending, float64."""
    return _combine(bound, name, parents).energies(bound.device)


def _combine(bound: BoundRecipe, name: str, parents: Sequence[WeightedUpdate]) -> LowRankSum:
    terms = COMBINE[bound.method.combine](bound.nonzero_terms(parents), bound.context(name, parents))
    return LowRankSum(bound.shapes[name], tuple(terms))


def _fuse_plain(bound: BoundRecipe, batch: Batch, *, build: bool) -> list[ModuleResult]:
    """Plain sums. Large adapters spend their time moving numbers, so the parents' factors are put side by side
    once, first to be compared, then to be the result.
    """
    rows = list(batch.parents.values())
    rank, limit = batch.rank, bound.rank_limit(rows[0])
    b, a = batch.stack(bound.compute_dtype, bound.device)
    scale = batch.scale(bound.device)
    # Over the limit: the Gram matrices in float64 serve the comparison and the truncation.
    if limit is not None and rank > limit:
        x = GramFactors.compute(b, a, scale)
        similar = compare_parents(b, a, x.gram_b * x.gram_a, rows)
        cuts = truncate(x, limit, build=build)
        return [ModuleResult(rank, rank, s).apply(cut) for s, cut in zip(similar, cuts, strict=True)]
    # Within the limit: compare the parents while the stack is unscaled.
    gram = inner_products(b, a)
    similar = compare_parents(b, a, gram, rows)
    squares = (gram * scale * scale.mT).sum(dim=(1, 2)).clamp(min=0).tolist()
    # Scale in place: from here on the stack is the result.
    if build:
        b.mul_(scale.to(b.dtype))
    return [
        ModuleResult(rank, rank, similar[i], FactorPair(b[i], a[i]) if build else None, kept_energy=squares[i])
        for i in range(len(rows))
    ]


def fuse_sums(bound: BoundRecipe, batch: Batch, sums: Iterable[LowRankSum], *, build: bool) -> list[ModuleResult]:
    """The results of a batch whose updates are `sums`, in its order, which are taken one at a time."""
    results: list[ModuleResult] = []
    over: dict[tuple[int, int], dict[int, LowRankSum]] = {}
    for parents, similarity, total in zip(batch.parents.values(), compare_batch(bound, batch), sums, strict=True):
        limit = bound.rank_limit(bound.nonzero_terms(parents))
        result = ModuleResult(total.rank, total.rank, similarity)
        if limit is not None and total.rank > limit:
            over.setdefault((total.rank, limit), {})[len(results)] = total
        else:
            kept = 0.0 if limit is None else total.square()
            factors = total.factors(bound.compute_dtype, bound.device) if build else None
            result = replace(result, kept_energy=kept, factors=factors)
        results.append(result)
    # Those over the same limit are truncated together.
    for (_, limit), chosen in over.items():
        x = GramFactors.compute(*build_sums(list(chosen.values()), DOUBLE, bound.device))
        for i, cut in zip(chosen, truncate(x, limit, build=build), strict=True):
            results[i] = results[i].apply(cut)
    return results
