"""LoRA on the experts of a base: every expert's projection is a module, `….experts.3.gate_proj`."""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from adapters.adapter import LoraAdapter, LoraModule

GATE_UP, HALVES = "gate_up_proj", ("gate_proj", "up_proj")
_EXPERT = re.compile(r"(.*\.experts)\.([0-9]{1,5})\.([a-z_]+)")


def split_gate_up(adapter: LoraAdapter) -> LoraAdapter:
    """The adapter with each expert's `gate_up_proj` as its two projections, which share its A: the gate has the first
    half of the rows of B. (GPT-OSS, whose rows take turns, is not of this form.)
    """
    modules: dict[str, LoraModule] = {}
    for name, module in adapter.modules.items():
        match = _EXPERT.fullmatch(name)
        if match is None or match[3] != GATE_UP or module.b.shape[0] % 2:
            modules[name] = module
            continue
        for half, b in zip(HALVES, module.b.chunk(2), strict=True):
            modules[f"{match[1]}.{match[2]}.{half}"] = replace(module, b=b.contiguous())
    return adapter if len(modules) == len(adapter.modules) else replace(adapter, modules=dict(sorted(modules.items())))


def complete_experts(adapter: LoraAdapter, shapes: Mapping[str, tuple[int, int]]) -> LoraAdapter:
    """The same update with a LoRA, at times of zeros, on every projection of every expert of the layers that have one,
    and one rank in each layer: vLLM stacks them. `shapes` has (d_out, d_in) of all experts' projections by module.
    """
    ranks: dict[str, int] = {}
    for name, module in adapter.modules.items():
        if (match := _EXPERT.fullmatch(name)) is not None:
            ranks[match[1]] = max(ranks.get(match[1], 1), module.rank)
    if not ranks:
        return adapter
    modules = {name: module for name, module in adapter.modules.items() if name not in shapes}
    for name, (d_out, d_in) in shapes.items():
        rank = ranks.get(name.rsplit(".", 2)[0])
        if rank is not None:
            known = adapter.modules.get(name)
            like = next(iter(adapter.modules.values())) if known is None else known
            a = _fill(like.a, None if known is None else known.a, (rank, d_in))
            b = _fill(like.b, None if known is None else known.b, (d_out, rank))
            modules[name] = LoraModule(a, b, 1.0 if known is None else known.scaling)
    return replace(adapter, modules=dict(sorted(modules.items())))


def _fill(like: Tensor, factor: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """`factor` with zeros up to `shape`."""
    filled = torch.zeros(shape, dtype=like.dtype)
    if factor is not None:
        filled[: factor.shape[0], : factor.shape[1]] = factor
    return filled
