"""Carry a recipe out, module by module: exactly where it can be, cut to the best rank that fits where it must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from adapters.adapter import LoraAdapter, LoraModule, finite, make_adapter
from adapters.algebra.account import Account, Outcome
from adapters.algebra.combine import COMBINE, Part, apart
from adapters.algebra.compare import Kinship, kinships
from adapters.algebra.job import Device, Job, Sum, bind, columns, stacked, weighted
from adapters.algebra.lowrank import Cut, Factors, inner, products, truncate, truncate_dense
from adapters.algebra.report import FusionReport
from adapters.errors import AdapterError, LossError
from adapters.recipes import Recipe

NEGLIGIBLE = 1e-6
"""The relative error that `strict` lets pass."""

Parents = Mapping[str, Sequence[Part]]
Pair = tuple[Tensor, Tensor]
Made = dict[str, tuple[Outcome, Pair | None]]


def fuse(
    recipe: Recipe,
    adapters: Mapping[str, LoraAdapter],
    *,
    max_rank: int | None = None,
    strict: bool = False,
    device: Device = None,
) -> tuple[LoraAdapter, FusionReport]:
    """Build the recipe's adapter: scaling 1 in every module, the adapters' promoted dtype, tensors
    on the CPU.

    What fits `max_rank` is exact; anything else is cut per module to its best approximation, computed on
    `device`, and the report says what that loses. Adapters of weight zero add neither rank nor modules.
    Raises UnknownAdapterError; FusionError for a schedule that gives a module no weight; AdapterError
    ('shape', 'base', or 'overflow' when float16 cannot hold the result); LossError when `strict` and the
    error is over NEGLIGIBLE.
    """
    modules, report = _carry_out(bind(recipe, adapters, max_rank, device), strict, build=True)
    base = next((adapters[name].base for name in recipe.adapters if adapters[name].base is not None), None)
    return make_adapter(modules, base), report


def plan(
    recipe: Recipe,
    adapters: Mapping[str, LoraAdapter],
    *,
    max_rank: int | None = None,
    strict: bool = False,
    device: Device = None,
) -> FusionReport:
    """The report `fuse` would give, number for number, without building anything; raises what
    `fuse` raises.
    """
    return _carry_out(bind(recipe, adapters, max_rank, device), strict, build=False)[1]


def _carry_out(job: Job, strict: bool, *, build: bool) -> tuple[dict[str, LoraModule], FusionReport]:
    account, modules = Account(job), {}
    for batch in job.batches():
        parents = {name: job.parents(name) for name in batch}
        made, kin = _batch(job, parents, build)
        account.enter({name: outcome for name, (outcome, _) in made.items()}, parents, kin)
        for name, (_, factors) in made.items():
            if factors is not None:
                modules[name] = _module(name, factors, job.dtype)
    report = account.report()
    if strict and report.error > NEGLIGIBLE:
        raise LossError(
            f"{report.recipe!r} is not exact: {report.verdict}, and strict allows {NEGLIGIBLE:g}; "
            "raise the rank limit or drop strict"
        )
    return modules, report


def _batch(job: Job, parents: Parents, build: bool) -> tuple[Made, list[Kinship]]:
    """Modules of one shape with parents of the same ranks. Large adapters spend their time moving numbers, so
    the parents' factors are put side by side once: to be compared, then, if all there is to do is to add, weighted
    in place, and that is the result, or what is cut.
    """
    rows = list(parents.values())
    plain = all(job.plain(row) for row in rows)
    rank, limit = sum(part.module.rank for part in rows[0]), job.limit(rows[0])
    wide = torch.promote_types(job.dtype, torch.float32)
    b, a = stacked([[part.module for part in row] for row in rows], wide, job.device)
    weights = columns([[(part.factor, part.module.rank) for part in row] for row in rows], job.device)
    before = Outcome(rank, rank)
    if plain and limit is not None and rank > limit:
        side = Factors.of(b, a, weights)
        kin = kinships(b, a, side.gram_b * side.gram_a, rows)
        cuts = truncate(side, limit, build=build)
        return {name: _after(before, cut) for name, cut in zip(parents, cuts, strict=True)}, kin
    gram = products(b, a)
    kin = kinships(b, a, gram, rows)
    if job.method.on == "update":
        return _updates(job, parents, build), kin
    if not plain:
        del b, a
        return _sums(job, parents, build), kin
    squares = (gram * weights * weights.mT).sum(dim=(1, 2)).clamp(min=0).tolist()
    if build:
        b.mul_(weights.to(wide))
    return {
        name: (replace(before, kept=squares[i]), (b[i], a[i]) if build else None) for i, name in enumerate(parents)
    }, kin


def combined(job: Job, name: str, parents: Sequence[Part]) -> Sum:
    """A module's update by a method that stays low-rank, before any cut."""
    combine = apart if job.method.on == "apart" else COMBINE[job.method.combine]
    return Sum(job.shapes[name], tuple(combine(job.terms(parents), job.context(name, parents))))


def dense_update(job: Job, name: str, parents: Sequence[Part]) -> Tensor | None:
    """A module's update by a method on the true update, d_out×d_in float32 or better; None for zero."""
    terms, context = job.terms(parents), job.context(name, parents)
    if not terms:
        return None
    sparse = [context.sparse(_dense(part, job.device), context.draw(part)) for part in terms]
    return context.settle(sparse, [part.weight for part in terms])


def _sums(job: Job, parents: Parents, build: bool) -> Made:
    """A batch by a method that stays low-rank; what is over its limit is cut."""
    wide = torch.promote_types(job.dtype, torch.float32)
    made: Made = {}
    over: dict[tuple[int, int], dict[str, Sum]] = {}
    for name, found in parents.items():
        total, limit = combined(job, name, found), job.limit(job.terms(found))
        exact = limit is None or total.rank <= limit
        outcome = Outcome(total.rank, total.rank, _square(total) if exact and limit is not None else 0.0)
        if job.method.on == "apart":
            plain = Sum(total.shape, tuple((part.weight, part.module) for part in job.terms(found)))
            turned = tuple((-weight, module) for weight, module in plain.parts)
            gap = _square(Sum(total.shape, (*total.parts, *turned)))
            outcome = replace(outcome, gap=gap, plain=_square(plain))
        made[name] = outcome, total.factors(wide, job.device) if build and exact else None
        if limit is not None and not exact:
            over.setdefault((total.rank, limit), {})[name] = total
    for (_, limit), sums in over.items():
        x = Factors.of(*weighted(list(sums.values()), torch.float64, job.device))
        for name, cut in zip(sums, truncate(x, limit, build=build), strict=True):
            made[name] = _after(made[name][0], cut)
    return made


def _after(before: Outcome, cut: Cut) -> tuple[Outcome, Pair | None]:
    factors = None if cut.b is None or cut.a is None else (cut.b, cut.a)
    return replace(before, rank=cut.rank, kept=cut.kept, lost=cut.lost), factors


def _updates(job: Job, parents: Parents, build: bool) -> Made:
    """A batch by a method on the true update: one dense module at a time, cut to the best rank at once."""
    made: Made = {}
    for name, found in parents.items():
        shape, update = job.shapes[name], dense_update(job, name, found)
        if update is None:
            made[name] = Outcome(1, 1), Sum(shape, ()).factors(torch.float32, job.device) if build else None
        else:
            cut = truncate_dense(update, job.limit(job.terms(found)) or min(shape), build=build)
            made[name] = _after(Outcome(min(shape), 1), cut)
    return made


def _dense(part: Part, device: Device) -> Tensor:
    module = part.module
    dtype = torch.promote_types(torch.promote_types(module.a.dtype, module.b.dtype), torch.float32)
    return (module.b.to(device, dtype) * module.scaling) @ module.a.to(device, dtype)


def _square(total: Sum) -> float:
    """‖ΔW‖² of a sum."""
    b, a = total.factors(torch.float64, None)
    return max(0.0, inner(b, a, b, a))


def _module(name: str, factors: Pair, dtype: torch.dtype) -> LoraModule:
    b, a = (factor.to("cpu", dtype) for factor in factors)
    if not (finite(a) and finite(b)):
        raise AdapterError(
            "overflow",
            f"the fused module {name!r} does not fit into {a.dtype}: convert the adapters to bfloat16",
        )
    return LoraModule(a.contiguous(), b.contiguous(), 1.0)
