"""Carry a recipe out: concatenate the factors, exactly, or cut the sum to the best rank that fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .adapter import LoraAdapter, LoraModule, check_together, make_adapter
from .errors import AdapterError, FusionError, LossError, UnknownAdapterError
from .lowrank import Cut, inner, truncate
from .methods import METHODS
from .recipe import Recipe
from .report import FusionReport, ModuleReport

NEGLIGIBLE = 1e-6
"""The relative error that `strict` lets pass."""

_BATCH_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class _Sum:
    """One module's weighted sum, not yet built: (weight, factors) of every adapter that has a say in it."""

    shape: tuple[int, int]
    parts: tuple[tuple[float, LoraModule], ...]

    @property
    def rank(self) -> int:
        return sum(module.rank for _, module in self.parts) or 1

    def factors(self, dtype: torch.dtype, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        """(B d_out×rank with weights and scalings folded in, A rank×d_in); zeros of rank 1 when
        nothing is left.
        """
        if not self.parts:
            d_out, d_in = self.shape
            return torch.zeros(d_out, 1, dtype=dtype, device=device), torch.zeros(1, d_in, dtype=dtype, device=device)
        b = [module.b.to(device, dtype) * (weight * module.scaling) for weight, module in self.parts]
        return torch.cat(b, dim=1), torch.cat([module.a.to(device, dtype) for _, module in self.parts])


def fuse(
    recipe: Recipe,
    adapters: Mapping[str, LoraAdapter],
    *,
    max_rank: int | None = None,
    strict: bool = False,
    device: torch.device | str | None = None,
) -> tuple[LoraAdapter, FusionReport]:
    """Build the recipe's adapter: scaling 1 in every module, the adapters' promoted dtype, tensors
    on the CPU.

    A sum whose rank fits `max_rank` is exact; any other is cut per module to its best
    approximation, computed in float64 on `device`, and the report says what that loses. Adapters of
    weight zero add neither rank nor modules. Raises UnknownAdapterError; AdapterError ('shape',
    'base', or 'overflow' when float16 cannot hold the result); LossError when `strict` and the
    error is over NEGLIGIBLE.
    """
    sums, cuts, report = _carry_out(recipe, adapters, max_rank, strict, device, build=True)
    dtype = _dtype(recipe, adapters)
    wide = torch.promote_types(dtype, torch.float32)
    modules = {}
    for name, total in sums.items():
        cut = cuts.get(name)
        b, a = (cut.b, cut.a) if cut is not None else total.factors(wide, device)
        assert b is not None and a is not None
        modules[name] = _module(name, a.to("cpu", dtype), b.to("cpu", dtype))
    return make_adapter(modules, _base(recipe, adapters)), report


def plan(
    recipe: Recipe,
    adapters: Mapping[str, LoraAdapter],
    *,
    max_rank: int | None = None,
    strict: bool = False,
    device: torch.device | str | None = None,
) -> FusionReport:
    """The report `fuse` would give, number for number, without building anything; raises what
    `fuse` raises.
    """
    return _carry_out(recipe, adapters, max_rank, strict, device, build=False)[2]


def _carry_out(
    recipe: Recipe,
    adapters: Mapping[str, LoraAdapter],
    max_rank: int | None,
    strict: bool,
    device: torch.device | str | None,
    *,
    build: bool,
) -> tuple[dict[str, _Sum], dict[str, Cut], FusionReport]:
    sums = _sums(recipe, adapters)
    limit = _limit(recipe, max_rank)
    over = {name: total for name, total in sums.items() if limit is not None and total.rank > limit}
    cuts = _cut(over, limit, device, build) if limit is not None and over else {}
    report = _report(recipe, sums, cuts, _dtype(recipe, adapters).itemsize)
    if strict and report.error > NEGLIGIBLE:
        raise LossError(
            f"{report.recipe!r} is not exact: {report.verdict}, and strict allows {NEGLIGIBLE:g}; "
            "raise the rank limit or drop strict"
        )
    return sums, cuts, report


def _sums(recipe: Recipe, adapters: Mapping[str, LoraAdapter]) -> dict[str, _Sum]:
    """Per module, sorted, what is to be summed. All of the recipe's adapters must fit together."""
    for name in recipe.adapters:
        if name not in adapters:
            raise UnknownAdapterError(name, adapters)
    used = {name: adapters[name] for name in recipe.adapters}
    check_together(used)
    live = {name: weight for name, weight in recipe.weights.items() if weight != 0.0}
    shapes: dict[str, tuple[int, int]] = {}
    for name in live or used:
        shapes.update(used[name].shapes)
    return {
        key: _Sum(shape, tuple((w, used[n].modules[key]) for n, w in live.items() if key in used[n].modules))
        for key, shape in sorted(shapes.items())
    }


def _limit(recipe: Recipe, max_rank: int | None) -> int | None:
    if max_rank is not None and (isinstance(max_rank, bool) or not isinstance(max_rank, int) or max_rank < 1):
        raise FusionError(f"max_rank is {max_rank!r}: expected a whole number from 1, or None for no limit")
    method = METHODS[recipe.method]
    own = method.function(method.filled(dict(recipe.options)))
    return min((limit for limit in (own, max_rank) if limit is not None), default=None)


def _cut(sums: Mapping[str, _Sum], limit: int, device: torch.device | str | None, build: bool) -> dict[str, Cut]:
    cuts: dict[str, Cut] = {}
    for names in _batches(sums):
        factors = [sums[name].factors(torch.float64, device) for name in names]
        b, a = torch.stack([b for b, _ in factors]), torch.stack([a for _, a in factors])
        cuts.update(zip(names, truncate(b, a, limit, build=build), strict=True))
    return cuts


def _batches(sums: Mapping[str, _Sum]) -> Iterator[Sequence[str]]:
    """Names of modules of one shape and rank, so many at once as the memory for a batch allows."""
    alike: dict[tuple[tuple[int, int], int], list[str]] = {}
    for name, total in sums.items():
        alike.setdefault((total.shape, total.rank), []).append(name)
    for ((d_out, d_in), rank), names in alike.items():
        count = max(1, _BATCH_BYTES // ((d_out + d_in) * rank * 8))
        for start in range(0, len(names), count):
            yield names[start : start + count]


def _report(recipe: Recipe, sums: Mapping[str, _Sum], cuts: Mapping[str, Cut], itemsize: int) -> FusionReport:
    lost, rows, size = sum(cut.lost for cut in cuts.values()), [], 0
    for name, total in sums.items():
        cut = cuts.get(name)
        rank = total.rank if cut is None else cut.rank
        share = 0.0 if cut is None or cut.lost == 0.0 else cut.lost / (cut.kept + cut.lost)
        rows.append(ModuleReport(name, total.rank, rank, 1.0 - share, math.sqrt(share)))
        size += rank * sum(total.shape) * itemsize
    share = lost / _energy(sums, cuts) if lost else 0.0
    return FusionReport(
        recipe=recipe.format(),
        method=recipe.method,
        rank=max(row.rank_after for row in rows),
        error=math.sqrt(share),
        energy=1.0 - share,
        exact=lost == 0.0,
        bytes=size,
        modules=tuple(rows),
    )


def _energy(sums: Mapping[str, _Sum], cuts: Mapping[str, Cut]) -> float:
    """‖ΔW‖² over all modules: from singular values where there are any, from Gram matrices elsewhere."""
    energy = 0.0
    for name, total in sums.items():
        if name in cuts:
            energy += cuts[name].kept + cuts[name].lost
        else:
            b, a = total.factors(torch.float64, None)
            energy += max(0.0, inner(b, a, b, a))
    return energy


def _dtype(recipe: Recipe, adapters: Mapping[str, LoraAdapter]) -> torch.dtype:
    return reduce(torch.promote_types, (adapters[name].dtype for name in recipe.adapters))


def _base(recipe: Recipe, adapters: Mapping[str, LoraAdapter]) -> str | None:
    bases = (adapters[name].base for name in recipe.adapters)
    return next((base for base in bases if base is not None), None)


def _module(name: str, a: Tensor, b: Tensor) -> LoraModule:
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterError(
            "overflow",
            f"the fused module {name!r} does not fit into {a.dtype}: convert the adapters to bfloat16",
        )
    return LoraModule(a.contiguous(), b.contiguous(), 1.0)
