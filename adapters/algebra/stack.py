"""The stack: adapters side by side at unit weight, so that any weighted sum of them is one row of weights."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adapters.adapter import LoraAdapter, LoraModule, make_adapter
from adapters.errors import FusionError, UnknownAdapterError
from adapters.together import check_together


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Adapters at fixed coordinates: `ranges[name]` is the half-open range that adapter owns in every module.

    `adapter` is float32, of rank `rank` and scaling 1 in every module. The update of a weighted sum is
    B · diag(row(weights)) · A.
    """

    adapter: LoraAdapter
    ranges: Mapping[str, tuple[int, int]]
    rank: int

    def row(self, weights: Mapping[str, float]) -> list[float]:
        """One weight per coordinate, `rank` long, zeros for adapters not named; UnknownAdapterError for a name that
        is not in the stack.
        """
        row = [0.0] * self.rank
        for name, weight in weights.items():
            if name not in self.ranges:
                raise UnknownAdapterError(name, self.ranges)
            start, stop = self.ranges[name]
            row[start:stop] = [float(weight)] * (stop - start)
        return row


def stack_rank(adapters: Mapping[str, LoraAdapter]) -> int:
    """The rank their stack would have: the sum of the largest ranks."""
    return sum(adapter.rank for adapter in adapters.values())


def stack(adapters: Mapping[str, LoraAdapter], *, same_base: bool = False) -> Stack:
    """Put adapters side by side in the order of their names; AdapterError when they do not fit one base, of which
    `same_base` says that it is one.

    In every module an adapter's factors start at its range; missing ranks and modules are zeros.
    Its scaling is multiplied into B in float32.
    """
    if not adapters:
        raise FusionError("a stack needs at least one adapter, got none")
    names = sorted(adapters)
    check_together({name: adapters[name] for name in names}, same_base=same_base)
    ranges: dict[str, tuple[int, int]] = {}
    rank = 0
    for name in names:
        ranges[name] = (rank, rank + adapters[name].rank)
        rank = ranges[name][1]
    shapes = {key: shape for adapter in adapters.values() for key, shape in adapter.shapes.items()}
    modules = {}
    for key, (d_out, d_in) in shapes.items():
        a, b = torch.zeros(rank, d_in), torch.zeros(d_out, rank)
        for name, (start, _) in ranges.items():
            part = adapters[name].modules.get(key)
            if part is not None:
                a[start : start + part.rank] = part.a
                b[:, start : start + part.rank] = part.b.to(torch.float32) * part.scaling
        is_embedding = any(adapter.facts[key].is_embedding for adapter in adapters.values() if key in adapter.facts)
        modules[key] = LoraModule(a, b, 1.0, is_embedding)
    base = next((adapters[name].base for name in names if adapters[name].base is not None), None)
    return Stack(make_adapter(modules, base), ranges, rank)
