"""Seam 2: the LoRA layers, where each token's shrink output meets that token's row of weights.

Both wrappers own `fusion_index`, the row of each token in `fusion_store`, of which every layer reads its own slices
(see `slices`); both are of fixed address, and the multiply is unconditional: nothing here depends on a Python branch
that a compiler could freeze. `seam` writes the index before each step, and the store where rows are new.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from service.engine.rows import TokenRows, weigh


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One adapter's factors of one layer, all slices together.

    `a_t` [d_in, slices*rank] and `b_t` [slices*rank, d_out], block-diagonal over the slices. `may_overflow` says
    whether x A^T can be infinite for a token that does not use the adapter.
    """

    a_t: torch.Tensor
    b_t: torch.Tensor
    slices: int
    rank: int
    may_overflow: bool


def pack(
    a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], widths: tuple[int, ...], slot: int
) -> PackedLayer | None:
    """The factors in `slot` of a layer's stacked slots, or None when the adapter lacks the layer."""
    used = [int(f[slot, 0].any(dim=0).nonzero().max()) + 1 for f in b if bool(f[slot].any())]
    if not used:
        return None
    rank = max(used)
    b_t = b[0].new_zeros(len(a) * rank, sum(widths))
    start = 0
    for i, width in enumerate(widths):
        block = b[i][slot, 0, :width, :rank]
        b_t[i * rank : (i + 1) * rank, start : start + width] = block.t()
        start += width
    a_t = torch.cat([f[slot, 0, :rank] for f in a]).t().contiguous()
    return PackedLayer(a_t, b_t, len(a), rank, may_overflow(a_t))


def may_overflow(a_t: torch.Tensor) -> bool:
    """Whether the product of an input with `a_t` [d_in, rank] can leave the range of its dtype.

    |x·a| <= |x| |a|, and an input of a sound base is far below the root of float32's and bfloat16's largest number,
    1.8e19. In float16 it is not, so there every product may.
    """
    largest = float(a_t.float().square().sum(0).max())
    return not largest < torch.finfo(a_t.dtype).max or a_t.dtype == torch.float16


def pack_embedding(b: torch.Tensor, slot: int) -> torch.Tensor | None:
    """B transposed, [rank, d], of an embedding in `slot` of [slots, 1, d, rank]; None when the adapter lacks it."""
    used = b[slot, 0].any(dim=0).nonzero()
    return b[slot, 0, :, : int(used.max()) + 1].t().contiguous() if used.numel() else None


class MixedPunicaCPU(TokenRows, PunicaWrapperCPU):
    """vLLM's CPU wrapper gathers A and B per token; this one runs two GEMMs per active slot.

    With one active slot, base tokens have rows of zeros, so nothing is gathered at all; with several,
    each slot's tokens are selected first. Layers an adapter lacks cost nothing. vLLM's own also lets the last slot's
    embedding and output head act on tokens without an adapter, whose slot is -1.
    """

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self.make_rows(max_num_batched_tokens, kwargs["lora_config"], device)
        self.fusion_rows = torch.ones(max_num_batched_tokens, kwargs["lora_config"].max_lora_rank)
        """The rows of a step's tokens where they are the same in all layers, [max tokens, max rank]."""
        self._uniform = True
        self._slot_ids: tuple[int | None, ...] = ()
        self._active: list[tuple[int, torch.Tensor | None]] = []
        self._packed: dict[tuple[int, int], PackedLayer | None] = {}
        self._embeddings: dict[tuple[int, int], torch.Tensor | None] = {}
        self.fusion_hidden: torch.Tensor | None = None
        """All hidden states of the step [tokens, d], while logits of prompts are computed from parts of them."""

    def update_metadata(self, mapping: Any, lora_index_to_id: list[int | None], *args: Any, **kwargs: Any) -> None:
        """Extends vLLM's: drop the packed factors of changed slots, and record the active slots."""
        super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)
        if self._slot_ids != tuple(lora_index_to_id):
            pairs = zip(self._slot_ids, lora_index_to_id, strict=False)
            unchanged_slots = {slot for slot, (old, new) in enumerate(pairs) if old == new}
            self._packed = {k: v for k, v in self._packed.items() if k[1] in unchanged_slots}
            self._embeddings = {k: v for k, v in self._embeddings.items() if k[1] in unchanged_slots}
            self._slot_ids = tuple(lora_index_to_id)
        tokens = self.token_lora_indices
        slots = [int(s) for s in torch.unique(tokens) if s >= 0]
        self._active = [(s, None if len(slots) == 1 else (tokens == s).nonzero()[:, 0]) for s in slots]

    def set_rows(self, index: NDArray[np.int64] | None, uniform: bool = True) -> None:
        """Extends it: rows that are the same in all layers are looked up once a step, as they were plain mixes'."""
        super().set_rows(index, uniform)
        self._uniform = uniform
        if index is None:
            self.fusion_rows.fill_(1.0)
        elif uniform:
            tokens = self.fusion_index[: len(index)]
            torch.index_select(self.fusion_store.rows[0], 0, tokens, out=self.fusion_rows[: len(index)])

    def _look_up(self, rows: torch.Tensor | None, index: torch.Tensor | None, tokens: int, rank: int) -> torch.Tensor:
        """Weights of a step's tokens, of those in `index` alone where there is one, in a layer of these `rows`.

        [tokens, 1 or slices, rank].
        """
        if self._uniform:
            if index is None:
                return self.fusion_rows[:tokens, None, :rank]
            return self.fusion_rows[index, None, :rank]
        if rows is None:
            raise RuntimeError("a LoRA layer has no rows of its own, but this step has weights by module")
        places = self.fusion_index[:tokens]
        return rows.index_select(1, places if index is None else places[index]).transpose(0, 1)[..., :rank]

    def _pack_layer(
        self, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], widths: tuple[int, ...], slot: int
    ) -> PackedLayer | None:
        key = (a[0].data_ptr(), slot)
        if key not in self._packed:
            self._packed[key] = pack(a, b, widths, slot)
        return self._packed[key]

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        rows: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """y [tokens, d_out] += ((x A^T) * weights * scale) B^T for the tokens of each active slot.

        The weights are the tokens' own among `rows` [slices, capacity, rank], this layer's part of the store.
        """
        for slot, index in self._active:
            layer = self._pack_layer(lora_a_stacked, lora_b_stacked, output_slices, slot)
            if layer is None:
                continue
            inputs = x if index is None else x[index]
            coordinates = (inputs @ layer.a_t).float().view(-1, layer.slices, layer.rank)
            weights = self._look_up(rows, index, x.size(0), layer.rank)
            coordinates.mul_(weights)
            if layer.may_overflow:  # zero times infinity would be NaN
                coordinates.masked_fill_(weights == 0, 0.0)
            if scale != 1.0:
                coordinates.mul_(scale)
            update = coordinates.view(-1, layer.slices * layer.rank).to(y.dtype)
            if index is None:
                y.addmm_(update, layer.b_t)
            else:
                y.index_add_(0, index, update @ layer.b_t)

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y [tokens, d] += (x * weights) B^T for the tokens of each active slot; x [tokens, rank] has their rows of A.

        Mixes have no embeddings: the weights are zeros or ones.
        """
        for slot, index in self._active:
            key = (lora_b_stacked.data_ptr(), slot)
            if key not in self._embeddings:
                self._embeddings[key] = pack_embedding(lora_b_stacked, slot)
            b_t = self._embeddings[key]
            if b_t is None:
                continue
            inputs = x if index is None else x[index]
            coordinates = inputs[:, : b_t.size(0)].float()
            weights = self._look_up(self.fusion_store.rows[:1], index, x.size(0), b_t.size(0))[:, 0]
            update = torch.where(weights == 0, 0.0, coordinates * weights).to(y.dtype)
            if index is None:
                y.addmm_(update, b_t)
            else:
                y.index_add_(0, index, update @ b_t)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """y [rows, vocabulary] += (x A^T * scale) B^T for the rows of each active slot; builds only, mixes have none.

        The rows are the tokens that are sampled from, or some of the step's tokens (`fusion_hidden`).
        """
        layers = {slot: self._pack_head(lora_a_stacked, lora_b_stacked, slot) for slot, _ in self._active}
        if not any(layers.values()):
            return
        slots = self._find_slots(x)
        for slot, layer in layers.items():
            index = (slots == slot).nonzero()[:, 0]
            if layer is None or not len(index):
                continue
            update = (x[index] @ layer.a_t).float().mul_(scale).to(y.dtype)
            y.index_add_(0, index, (update @ layer.b_t.to(y.dtype))[:, : y.size(1)])

    def _pack_head(self, a: torch.Tensor, b: torch.Tensor, slot: int) -> PackedLayer | None:
        return self._pack_layer((a,), (b,), (b.shape[-2],), slot)

    def _find_slots(self, x: torch.Tensor) -> torch.Tensor:
        """The slot of each row of hidden states `x`."""
        slots: torch.Tensor = self.sampler_indices
        first = 0
        if self.fusion_hidden is not None:
            slots = self.token_lora_indices
            first = (x.data_ptr() - self.fusion_hidden.data_ptr()) // (x.stride(0) * x.itemsize)
        return slots[first : first + x.size(0)]


def cuda_wrapper() -> type:
    """The CUDA wrapper with the multiply; made on demand, because its module needs Triton to import."""
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    class MixedPunicaGPU(TokenRows, PunicaWrapperGPU):  # type: ignore[misc]  # final upstream for typing only
        """vLLM's Triton kernels with one elementwise step between shrink and expand."""

        def __init__(
            self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
        ) -> None:
            super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
            self.make_rows(max_num_batched_tokens, kwargs["lora_config"], device)

        def add_shrink(
            self,
            y: torch.Tensor,
            x: torch.Tensor,
            lora_a_stacked: tuple[torch.Tensor, ...],
            scale: float,
            *,
            rows: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> None:
            """y [slices, tokens, rank] float32 = (x A^T) * scale * weights, and 0 where the weight is 0.

            The weights are the tokens' own among `rows` [slices, capacity, rank], this layer's part of the store.
            """
            super().add_shrink(y, x, lora_a_stacked, scale, **kwargs)
            weigh(y, self.fusion_store.rows[:1] if rows is None else rows, self.fusion_index)

    return MixedPunicaGPU
