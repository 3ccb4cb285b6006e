"""Carry a recipe out, batch by batch: exactly where it can be, truncated to the best rank that fits elsewhere."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from adapters.adapter import LoraAdapter, LoraModule, is_finite, make_adapter
from adapters.algebra.bound import BoundRecipe, bind
from adapters.algebra.combine import WeightedUpdate
from adapters.algebra.factors import Device
from adapters.algebra.lowrank import FactorPair
from adapters.algebra.report import FusionReport, ModuleReport, ReportBuilder
from adapters.algebra.strategy import STRATEGIES
from adapters.errors import AdapterError, LossError, quote
from adapters.recipes import Recipe, check_prompt

STRICT_TOLERANCE = 1e-6
"""The relative error up to which `strict` takes a fusion for exact."""


def fuse(
    recipe: Recipe,
    adapters: Mapping[str, LoraAdapter],
    *,
    max_rank: int | None = None,
    strict: bool = False,
    device: Device = None,
    same_base: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[LoraAdapter, FusionReport]:
    """Build the recipe's adapter: scaling 1 in every module, factors in `dtype`, tensors on the CPU. By default that is
    the adapters' promoted dtype, to which the factors are rounded: by 0.2 % in bfloat16.

    What fits `max_rank` is exact; anything else is truncated per module to its best approximation, computed on
    `device`, and the report says what that loses. Adapters of weight zero add neither rank nor modules. `same_base`
    says that all are of one base, however they name it and whether or not they share a module. The result acts on the
    answer alone when the recipe has weights there only, or all its adapters do.

    Raises:
        UnknownAdapterError: the recipe names an adapter that is not in `adapters`.
        AdapterError: 'shape', 'base', 'modules' (see `check_together`), or 'overflow' when the result, or what is
            computed on the way, is not finite.
        LossError: `strict`, and the error is over STRICT_TOLERANCE.
        RecipeError: it combines adapters that act on the answer alone with others (see `check_prompt`).
        FusionError: a schedule gives a module no weight, weights differ between prompts or positions, there is not one
            weight for each rank component, or `max_rank` is not a rank.
    """
    bound = bind(recipe, adapters, max_rank, device, same_base=same_base)
    bound = bound if dtype is None else replace(bound, dtype=dtype)
    if not bound.answer_only:
        check_prompt(recipe, [name for name, adapter in bound.adapters.items() if adapter.answer_only])
    modules, report = _carry_out(bound, strict, build=True)
    base = next((adapters[name].base for name in recipe.adapters if adapters[name].base is not None), None)
    return make_adapter(modules, base, answer_only=bound.answer_only), report


def plan(
    recipe: Recipe,
    adapters: Mapping[str, LoraAdapter],
    *,
    max_rank: int | None = None,
    strict: bool = False,
    device: Device = None,
    same_base: bool = False,
) -> FusionReport:
    """The report `fuse` would give, number for number, without building anything; raises what `fuse` raises, except
    for adapters that act on the answer alone: the recipe may be one phase of what is served.
    """
    return _carry_out(bind(recipe, adapters, max_rank, device, same_base=same_base), strict, build=False)[1]


def _carry_out(bound: BoundRecipe, strict: bool, *, build: bool) -> tuple[dict[str, LoraModule], FusionReport]:
    strategy, builder, modules = STRATEGIES[bound.method.on], ReportBuilder(bound), {}
    for batch in bound.batches():
        try:
            results = strategy.fuse_batch(bound, batch, build=build)
        except RuntimeError as error:  # a decomposition or a selection, of NaN
            if not any(_may_overflow(parent) for parents in batch.parents.values() for parent in parents):
                raise
            raise _overflow(bound) from error
        for (name, parents), result in zip(batch.parents.items(), results, strict=True):
            builder.add(name, parents, result)
            if result.factors is not None:
                is_embedding = parents[0].module.is_embedding
                modules[name] = _make_module(name, result.factors, bound.dtype, is_embedding=is_embedding)
    report = builder.finish()
    if not (math.isfinite(report.error) and all(map(_is_finite_row, report.modules))):
        raise _overflow(bound)
    if strict and report.error > STRICT_TOLERANCE:
        raise LossError(
            f"{quote(report.recipe)} is not exact: {report.verdict}, and strict allows {STRICT_TOLERANCE:g}; "
            "raise the rank limit or drop strict"
        )
    return modules, report


def _may_overflow(parent: WeightedUpdate) -> bool:
    """Whether squares of the weighted update can leave float32's range: |w·s| |b| |a| rank is over its root."""
    a, b = (float(factor.abs().max()) for factor in (parent.module.a, parent.module.b))
    size = abs(parent.factor) * a * b * parent.module.rank
    return not size < math.sqrt(torch.finfo(torch.float32).max)


def _is_finite_row(row: ModuleReport) -> bool:
    return all(map(math.isfinite, (row.error, row.energy, row.cosine or 0.0, row.conflict or 0.0, *row.norms.values())))


def _overflow(bound: BoundRecipe) -> AdapterError:
    return AdapterError(
        "overflow",
        f"{bound.recipe.format()!r:.120} cannot be computed: products of its adapters' numbers are infinite; expected "
        "adapters with finite updates, so check lora_alpha and that the training did not diverge",
    )


def _make_module(name: str, factors: FactorPair, dtype: torch.dtype, *, is_embedding: bool) -> LoraModule:
    b, a = (factor.to("cpu", dtype) for factor in factors)
    if not (is_finite(a) and is_finite(b)):
        way_out = "convert the adapters to bfloat16" if dtype == torch.float16 else "check lora_alpha and the weights"
        raise AdapterError("overflow", f"the fused module {name!r} does not fit into {dtype}: {way_out}")
    return LoraModule(a.contiguous(), b.contiguous(), 1.0, is_embedding)
