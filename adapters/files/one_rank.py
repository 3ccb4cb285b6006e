"""Adapters for readers that know no patterns: those that scale every module by `lora_alpha / r`, some by the config's
r, some by the module's own rank. With one rank and one alpha for all modules, both are right.
"""

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from adapters.adapter import LoraAdapter, LoraModule, is_finite
from adapters.errors import AdapterError
from adapters.files.rounding import round_factors


def to_one_rank(adapter: LoraAdapter, dtype: torch.dtype | None = None) -> LoraAdapter:
    """The same update at one rank, the largest, and one scaling, the most frequent: zeros fill up the factors, and B
    takes what a module's scaling differs by. The adapter itself when nothing is to be done.

    Where that rounds numbers, all factors are in `dtype`; by default in float32, unless the adapter's own dtype changes
    no update by more than `rounding.TOLERANCE`. A note says what was done. AdapterError 'overflow' when a B does not
    fit into its dtype.
    """
    rank = adapter.rank
    modules = dict(adapter.modules.items())
    scaling = Counter(module.scaling for module in modules.values()).most_common(1)[0][0] or 1.0
    if all((module.rank, module.scaling) == (rank, scaling) for module in modules.values()):
        return adapter
    is_plain = all(module.scaling == scaling for module in modules.values())
    wide = None if is_plain else torch.promote_types(adapter.dtype, torch.float32)
    padded = replace(adapter, modules={n: _pad(n, module, rank, scaling, wide) for n, module in modules.items()})
    if is_plain:
        return padded
    rounded = round_factors(padded, dtype, adapter.dtype)
    if not (rounded.error or rounded.spared):
        return rounded.adapter
    note = f"for one lora_alpha for all modules the factors are written in {rounded.describe()}"
    return replace(rounded.adapter, notes=(*adapter.notes, note))


def _pad(name: str, module: LoraModule, rank: int, scaling: float, dtype: torch.dtype | None) -> LoraModule:
    """The module at that rank and scaling, in `dtype`, or its own."""
    a, b = (module.a, module.b) if dtype is None else (module.a.to(dtype), module.b.to(dtype))
    if module.scaling != scaling:
        b = b * (module.scaling / scaling)
        if not is_finite(b):
            raise AdapterError("overflow", f"module {name!r} at one scaling for all does not fit into {b.dtype}")
    return LoraModule(_fill(a, (rank, a.shape[1])), _fill(b, (b.shape[0], rank)), scaling, module.is_embedding)


def _fill(factor: Tensor, shape: tuple[int, int]) -> Tensor:
    if tuple(factor.shape) == shape:
        return factor
    filled = torch.zeros(shape, dtype=factor.dtype, device=factor.device)
    filled[: factor.shape[0], : factor.shape[1]] = factor
    return filled
