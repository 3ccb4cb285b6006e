"""A recipe bound to its adapters: every step of a fusion reads from here, module by module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from adapters.adapter import LoraAdapter, LoraModule, check_together, room
from adapters.algebra.combine import Context, Part
from adapters.errors import FusionError, UnknownAdapterError
from adapters.recipes import METHODS, Method, Recipe
from adapters.recipes.method import Value
from adapters.recipes.weights import layer_range, weight_at

BATCH_BYTES = 256 << 20
Device = torch.device | str | None


@dataclass(frozen=True, slots=True)
class Sum:
    """One module's update as a weighted sum of factors, not yet built."""

    shape: tuple[int, int]
    parts: tuple[tuple[float, LoraModule], ...]

    @property
    def rank(self) -> int:
        return sum(module.rank for _, module in self.parts) or 1

    def factors(self, dtype: torch.dtype, device: Device) -> tuple[Tensor, Tensor]:
        """(B d_out×rank with weights and scalings folded in, A rank×d_in); zeros of rank 1 when
        nothing is left.
        """
        b, a = weighted([self], dtype, device)
        return b[0], a[0]


def stacked(rows: Sequence[Sequence[LoraModule]], dtype: torch.dtype, device: Device) -> tuple[Tensor, Tensor]:
    """The factors of the modules of each row side by side, as they are: n×d_out×k and n×k×d_in. All rows have
    the shapes and ranks of the first.
    """
    (d_out, d_in), rank = rows[0][0].shape, sum(module.rank for module in rows[0])
    b, a = room((len(rows), d_out, rank), dtype, device), room((len(rows), rank, d_in), dtype, device)
    for i, modules in enumerate(rows):
        start = 0
        for module in modules:
            stop = start + module.rank
            b[i, :, start:stop] = module.b
            a[i, start:stop] = module.a
            start = stop
    return b, a


def weighted(sums: Sequence[Sum], dtype: torch.dtype, device: Device) -> tuple[Tensor, Tensor]:
    """The factors of sums of one shape and the same ranks, weights and scalings in B: n×d_out×k and n×k×d_in."""
    if not sums[0].parts:
        (d_out, d_in), n = sums[0].shape, len(sums)
        zeros = torch.zeros(n, d_out + d_in, 1, dtype=dtype, device=device)
        return zeros[:, :d_out], zeros[:, d_out:].mT
    b, a = stacked([[module for _, module in total.parts] for total in sums], dtype, device)
    scale = columns([[(w * module.scaling, module.rank) for w, module in total.parts] for total in sums], device)
    return b.mul_(scale.to(dtype)), a


def columns(rows: Sequence[Sequence[tuple[float, int]]], device: Device) -> Tensor:
    """Per row (factor, rank) pairs as one factor per coordinate, n×1×k float64."""
    spread = [[factor for factor, rank in row for _ in range(rank)] for row in rows]
    return torch.tensor(spread, dtype=torch.float64, device=device)[:, None]


@dataclass(frozen=True, slots=True)
class Job:
    """A recipe bound to its adapters: what every step below reads."""

    recipe: Recipe
    adapters: Mapping[str, LoraAdapter]
    method: Method
    options: Mapping[str, Value]
    shapes: Mapping[str, tuple[int, int]]
    layers: tuple[int, int]
    max_rank: int | None
    device: Device
    dtype: torch.dtype
    """The adapters' promoted dtype."""

    def batches(self) -> Iterator[Sequence[str]]:
        """Modules in turns: of one shape, with the same parents of the same ranks, as many as memory allows."""
        alike: dict[tuple[tuple[int, int], tuple[str, ...], tuple[int, ...]], list[str]] = {}
        for module, shape in self.shapes.items():
            parents = tuple(name for name, adapter in self.adapters.items() if module in adapter.facts)
            ranks = tuple(self.adapters[name].facts[module].rank for name in parents)
            alike.setdefault((shape, parents, ranks), []).append(module)
        for ((d_out, d_in), _, ranks), modules in alike.items():
            count = max(1, BATCH_BYTES // ((d_out + d_in) * sum(ranks) * 8))
            for start in range(0, len(modules), count):
                yield modules[start : start + count]

    def parents(self, module: str) -> tuple[Part, ...]:
        """Every adapter that has `module`, at its weight there; what plays a role at weight 1."""
        found = []
        for name, adapter in self.adapters.items():
            if module in adapter.facts:
                weight = self.recipe.weights.get(name, 1.0)
                found.append(Part(name, adapter, weight_at(weight, module, self.layers), adapter.modules[module]))
        return tuple(found)

    def terms(self, parents: Sequence[Part]) -> list[Part]:
        """The parents that add to the result: terms of a weight other than zero."""
        return [part for part in parents if part.name in self.recipe.weights and part.weight != 0.0]

    def context(self, module: str, parents: Sequence[Part]) -> Context:
        """What the method knows about `module`."""
        by_name = {part.name: part.module for part in parents}
        roles = {option: by_name.get(name) for option, name in self.recipe.roles.items()}
        return Context(module, self.method, self.options, roles, self.device)

    def plain(self, parents: Sequence[Part]) -> bool:
        """Whether the module's update is the weighted sum of all its parents, as they are."""
        return self.method.on == "factors" and self.method.combine == "sum" and len(self.terms(parents)) == len(parents)

    def limit(self, parts: Sequence[Part]) -> int | None:
        """The rank above which the module's update is cut, None for no limit."""
        own: int | None = None
        if "rank" in self.options:
            own = int(self.options["rank"]) or self._default_rank(parts)
        return min((limit for limit in (own, self.max_rank) if limit is not None), default=None)

    def _default_rank(self, parts: Sequence[Part]) -> int:
        if self.method.default_rank == "max":
            return max(self.adapters[name].rank for name in self.recipe.weights)
        return sum(part.module.rank for part in parts) or 1


def bind(recipe: Recipe, adapters: Mapping[str, LoraAdapter], max_rank: int | None, device: Device) -> Job:
    """Check that all that the recipe names is there and fits together."""
    for name in recipe.adapters:
        if name not in adapters:
            raise UnknownAdapterError(name, adapters)
    if max_rank is not None and (isinstance(max_rank, bool) or not isinstance(max_rank, int) or max_rank < 1):
        raise FusionError(f"max_rank is {max_rank!r}: expected a whole number from 1, or None for no limit")
    used = {name: adapters[name] for name in recipe.adapters}
    check_together(used)
    live = [name for name, weight in recipe.weights.items() if weight != 0.0]
    shapes: dict[str, tuple[int, int]] = {}
    for name in live or recipe.weights:
        shapes.update(used[name].shapes)
    method = METHODS[recipe.method]
    options = method.filled(dict(recipe.options))
    layers = layer_range(key for adapter in used.values() for key in adapter.shapes)
    dtype = reduce(torch.promote_types, (adapter.dtype for adapter in used.values()))
    return Job(recipe, used, method, options, dict(sorted(shapes.items())), layers, max_rank, device, dtype)
