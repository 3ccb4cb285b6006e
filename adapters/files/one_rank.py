"""Adapters for readers that know no patterns: those that scale every module by `lora_alpha / r`, some by the config's
r, some by the module's own rank. With one rank and one alpha for all modules, both are right.
"""

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from adapters.adapter import LoraAdapter, LoraModule, is_finite
from adapters.errors import AdapterError


def to_one_rank(adapter: LoraAdapter) -> LoraAdapter:
    """The same update at one rank, the largest, and one scaling, the most frequent: zeros fill up the factors, and B
    takes what a module's scaling differs by, rounded to its dtype. The adapter itself when nothing is to be done.

    AdapterError 'overflow' when a B does not fit into its dtype.
    """
    rank = adapter.rank
    modules = dict(adapter.modules.items())
    scaling = Counter(module.scaling for module in modules.values()).most_common(1)[0][0] or 1.0
    if all((module.rank, module.scaling) == (rank, scaling) for module in modules.values()):
        return adapter
    padded = {name: _pad(name, module, rank, scaling) for name, module in modules.items()}
    errors = [_measure_rounding(module, padded[name], scaling) for name, module in modules.items()]
    notes = adapter.notes
    if rounded := sum(error > 0 for error in errors):
        dtypes = ", ".join(sorted({str(module.b.dtype).removeprefix("torch.") for module in modules.values()}))
        notes += (f"one lora_alpha for all modules rounds B of {rounded} to {dtypes}, by {max(errors):.1e} at most",)
    return replace(adapter, modules=padded, notes=notes)


def _measure_rounding(module: LoraModule, padded: LoraModule, scaling: float) -> float:
    """The relative error of B (Frobenius norm) against what its module would need at that scaling."""
    exact = module.b.double() * (module.scaling / scaling)
    difference = float((padded.b[:, : module.rank].double() - exact).norm())
    return difference / float(exact.norm()) if difference else 0.0


def _pad(name: str, module: LoraModule, rank: int, scaling: float) -> LoraModule:
    b = module.b
    if module.scaling != scaling:
        b = (b.to(module.compute_dtype) * (module.scaling / scaling)).to(b.dtype)
        if not is_finite(b):
            raise AdapterError("overflow", f"module {name!r} at one scaling for all does not fit into {b.dtype}")
    return LoraModule(
        _fill(module.a, (rank, module.a.shape[1])), _fill(b, (b.shape[0], rank)), scaling, module.is_embedding
    )


def _fill(factor: Tensor, shape: tuple[int, int]) -> Tensor:
    if tuple(factor.shape) == shape:
        return factor
    filled = torch.zeros(shape, dtype=factor.dtype, device=factor.device)
    filled[: factor.shape[0], : factor.shape[1]] = factor
    return filled
