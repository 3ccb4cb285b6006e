"""Carry a recipe out: exact concatenation, or the best rank that fits."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.adapter import LoraAdapter, LoraModule, check_together, make_adapter
from adapters.errors import LossError, UnknownAdapterError
from adapters.lowrank import compress
from adapters.recipe import Recipe
from adapters.report import FusionReport, ModuleReport

NEGLIGIBLE = 1e-6


@dataclass(frozen=True, slots=True)
class _Factors:
    """A module's summed update as B·A: `b` [d_out, R], `a` [R, d_in], float32 or better."""

    b: Tensor
    a: Tensor


def _parents(recipe: Recipe, adapters: Mapping[str, LoraAdapter]) -> dict[str, LoraAdapter]:
    for name in recipe.adapters:
        if name not in adapters:
            raise UnknownAdapterError(name, adapters)
    parents = {name: adapters[name] for name in recipe.adapters}
    check_together(parents)
    return parents


def _concatenate(
    recipe: Recipe, parents: Mapping[str, LoraAdapter], device: torch.device | str | None
) -> dict[str, _Factors]:
    """The exact sum's factors: A's stacked, B's side by side with weight and scaling folded in."""
    weights, factors = recipe.weights, {}
    shapes = {key: shape for parent in parents.values() for key, shape in parent.shapes.items()}
    for key, (d_out, d_in) in sorted(shapes.items()):
        parts = [(w, parents[n].modules[key]) for n, w in weights.items() if key in parents[n].modules]
        parts = [(w, m) for w, m in parts if w != 0]
        if not parts:  # all weights zero: a valid adapter that does nothing
            factors[key] = _Factors(torch.zeros(d_out, 1), torch.zeros(1, d_in))
            continue
        kind = torch.promote_types(parts[0][1].a.dtype, torch.float32)
        b = torch.cat([m.b.to(device, kind) * (w * m.scaling) for w, m in parts], dim=1)
        a = torch.cat([m.a.to(device, kind) for _, m in parts], dim=0)
        factors[key] = _Factors(b, a)
    return factors


def _targets(recipe: Recipe, factors: Mapping[str, _Factors], max_rank: int | None) -> dict[str, int | None]:
    """Per module the rank to truncate to, None where the concatenation is kept."""
    asked = dict(recipe.options).get("rank") if recipe.method == "svd" else None
    limit = min((r for r in (asked, max_rank) if r is not None), default=None)
    targets: dict[str, int | None] = {}
    for key, f in factors.items():
        whole = f.a.shape[0]
        over = limit is not None and (whole > limit or recipe.method == "svd")
        targets[key] = min(int(limit), whole, *f.a.shape[1:], f.b.shape[0]) if over and limit else None
    return targets


def fuse(
    recipe: Recipe,
    adapters: Mapping[str, LoraAdapter],
    *,
    max_rank: int | None = None,
    strict: bool = False,
    device: torch.device | str | None = None,
) -> tuple[LoraAdapter, FusionReport]:
    """Materialise `recipe` as one adapter of at most rank `max_rank`.

    Plain sums that fit are exact; others get the best rank that fits and the report says what was lost.
    Raises `UnknownAdapterError`, `AdapterError` when the adapters do not go together, `LossError` when
    `strict` and the relative error is over 1e-6.
    """
    parents = _parents(recipe, adapters)
    factors = _concatenate(recipe, parents, device)
    targets = _targets(recipe, factors, max_rank)
    done = {key: (f.b, f.a) for key, f in factors.items() if targets[key] is None}
    spectra: dict[str, Tensor] = {}
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for key, target in targets.items():
        if target is not None:
            alike[(factors[key].b.shape, factors[key].a.shape, target)].append(key)
    for (_, _, rank), keys in alike.items():
        stacked_b = torch.stack([factors[k].b for k in keys])
        stacked_a = torch.stack([factors[k].a for k in keys])
        b, a, s = compress(stacked_b, stacked_a, rank)  # type: ignore[arg-type]
        for i, key in enumerate(keys):
            done[key] = (b[i], a[i])
            spectra[key] = s[i]
    dtypes = [parent.dtype for parent in parents.values()]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    modules = {
        key: LoraModule(a.to("cpu", dtype).contiguous(), b.to("cpu", dtype).contiguous(), 1.0)
        for key, (b, a) in sorted(done.items())
    }
    adapter = make_adapter(modules, next((p.base for p in parents.values() if p.base), None))
    report = _report(recipe, factors, modules, spectra)
    if strict and report.error > NEGLIGIBLE:
        raise LossError(
            f"{recipe.format()!r}: {report.verdict}; raise the rank limit or drop strict"
        )
    return adapter, report


def plan(
    recipe: Recipe,
    adapters: Mapping[str, LoraAdapter],
    *,
    max_rank: int | None = None,
    device: torch.device | str | None = None,
) -> FusionReport:
    """What `fuse` would report; nothing is kept."""
    return fuse(recipe, adapters, max_rank=max_rank, device=device)[1]


def _report(
    recipe: Recipe,
    factors: Mapping[str, _Factors],
    modules: Mapping[str, LoraModule],
    spectra: Mapping[str, Tensor],
) -> FusionReport:
    rows, total, lost = [], 0.0, 0.0
    for key, module in modules.items():
        before = factors[key].a.shape[0]
        if key not in spectra:
            rows.append(ModuleReport(key, before, module.rank, 1.0, 0.0))
            total += _energy(factors[key])
            continue
        energies = spectra[key].square()
        whole, tail = float(energies.sum()), float(energies[module.rank :].sum())
        total, lost = total + whole, lost + tail
        share = tail / whole if whole else 0.0
        rows.append(ModuleReport(key, before, module.rank, 1 - share, math.sqrt(share)))
    share = lost / total if total else 0.0
    return FusionReport(
        recipe=recipe.format(),
        method=recipe.method,
        rank=max(module.rank for module in modules.values()),
        error=math.sqrt(share),
        energy=1 - share,
        exact=not spectra,
        bytes=sum(m.a.nbytes + m.b.nbytes for m in modules.values()),
        modules=tuple(rows),
    )


def _energy(f: _Factors) -> float:
    """‖B·A‖² from the Gram matrices of the factors."""
    return max(float(((f.b.T @ f.b).double() * (f.a @ f.a.T).double()).sum()), 0.0)
