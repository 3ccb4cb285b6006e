"""The factors of one adapter in one layer, packed for the CPU's layers."""

from dataclasses import dataclass

import numpy as np
import torch

from service.engine.cpu_kernel import Blocks, cut

WIDE_RANK = 16
"""From this rank on, a product for each slice is faster than one with the zeros between slices."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some slices of a layer: which coordinates and which outputs are theirs, and `b_t` [coordinates, outputs]."""

    coordinates: slice
    outputs: slice
    b_t: torch.Tensor


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One adapter's factors of one layer, all slices together.

    `a` [slices*rank, d_in] has the coordinates from `first` on of every slice, and `parts` what these act on; `blocks`
    are the same for the kernel, None in other dtypes than float32. `may_overflow` says whether x A^T can be infinite
    for a token that does not use the adapter.
    """

    a: torch.Tensor
    parts: tuple[Part, ...]
    slices: int
    first: int
    rank: int
    may_overflow: bool
    blocks: Blocks | None


def pack(
    a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], widths: tuple[int, ...], slot: int
) -> PackedLayer | None:
    """The factors in `slot` of a layer's stacked slots, or None when the adapter lacks the layer."""
    own_a = [f[slot, 0] for f in a]
    own_b = [f[slot, 0, :width] for f, width in zip(b, widths, strict=True)]
    used = [f.any(dim=0).numpy() for f in own_b]
    coordinates = np.flatnonzero(np.logical_or.reduce(used))
    if not len(coordinates):
        return None
    first, end = int(coordinates[0]), int(coordinates[-1]) + 1
    joint = torch.cat([f[first:end] for f in own_a])
    parts = _divide([f[:, first:end] for f in own_b], end - first)
    blocks = cut(own_a, own_b, used) if joint.dtype == torch.float32 else None
    return PackedLayer(joint, parts, len(a), first, end - first, may_overflow(joint), blocks)


def _divide(b: list[torch.Tensor], rank: int) -> tuple[Part, ...]:
    """Parts of a layer whose slices have the factors `b` [d_out, rank]."""
    parts, start = list[Part](), 0
    for i, factor in enumerate(b):
        coordinates, outputs = slice(i * rank, (i + 1) * rank), slice(start, start + len(factor))
        parts.append(Part(coordinates, outputs, _copy_transposed(factor)))
        start += len(factor)
    if rank >= WIDE_RANK or len(parts) == 1:
        return tuple(parts)
    whole = b[0].new_zeros(len(b) * rank, start)
    for part in parts:
        whole[part.coordinates, part.outputs] = part.b_t
    return (Part(slice(None), slice(None), whole),)


def may_overflow(a: torch.Tensor) -> bool:
    """Whether the product of an input with `a` [rank, d_in] can leave the range of its dtype.

    |x·a| <= |x| |a|, and an input of a sound base is far below the root of float32's and bfloat16's largest number,
    1.8e19. In float16 it is not, so there every product may.
    """
    largest = float(a.float().square().sum(1).max())
    return not largest < torch.finfo(a.dtype).max or a.dtype == torch.float16


def pack_embedding(b: torch.Tensor, slot: int) -> torch.Tensor | None:
    """B transposed, [rank, d], of an embedding in `slot` of [slots, 1, d, rank]; None when the adapter lacks it."""
    used = b[slot, 0].any(dim=0).nonzero()
    return _copy_transposed(b[slot, 0, :, : int(used.max()) + 1]) if used.numel() else None


def _copy_transposed(b: torch.Tensor) -> torch.Tensor:
    """B transposed, in memory of its own: `contiguous` copies no single column, and the slot has others' later."""
    return b.t().clone(memory_format=torch.contiguous_format)
