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

from service.engine.cpu_kernel import Blocks, add_update, compile_kernel, most_tokens
from service.engine.factors import PackedLayer, pack, pack_embedding
from service.engine.rows import TokenRows


@dataclass(frozen=True, slots=True)
class ActiveSlot:
    """A slot that tokens of the step use: its number, these tokens for the kernel, and `index`, the same for matrix
    products; None where it is the only slot, and all tokens take part.
    """

    slot: int
    tokens: NDArray[np.int64]
    index: torch.Tensor | None


class MixedPunicaCPU(TokenRows, PunicaWrapperCPU):
    """vLLM's CPU wrapper gathers A and B per token; this one runs a kernel of its own, or two GEMMs, per active slot.

    The GEMMs are for other dtypes than float32, and for many tokens where there are many threads. With one active
    slot, base tokens have rows of zeros there, so nothing is gathered at all; with several, each slot's tokens are
    selected first. Layers an adapter lacks cost nothing. vLLM's own also lets the last slot's embedding and output
    head act on tokens without an adapter, whose slot is -1.
    """

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self.make_rows(max_num_batched_tokens, kwargs["lora_config"], device)
        self.fusion_rows = torch.ones(max_num_batched_tokens, kwargs["lora_config"].max_lora_rank)
        """The rows of a step's tokens where they are the same in all layers, [max tokens, max rank]."""
        self._all_rows = self.fusion_rows.numpy()[None]
        self._uniform = True
        self._slot_ids: tuple[int | None, ...] = ()
        self._active: list[ActiveSlot] = []
        self._positions = np.arange(max_num_batched_tokens)
        self._most_tokens = most_tokens()
        compile_kernel()
        self._packed: dict[tuple[int, int], PackedLayer | None] = {}
        self.fusion_packs: dict[int, dict[int, PackedLayer | None]] = {}
        """The layers of adapters that were packed when they were loaded, by id and address (see `loads`)."""
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
        tokens = self.token_lora_indices.numpy()
        slots = [int(s) for s in np.unique(tokens) if s >= 0]
        places = [(tokens == slot).nonzero()[0] for slot in slots]
        self._active = [
            ActiveSlot(slot, own, torch.from_numpy(own) if len(slots) > 1 else None)
            for slot, own in zip(slots, places, strict=True)
        ]

    def set_rows(self, index: NDArray[np.int64] | None, uniform: bool = True) -> None:
        """Extends it: rows that are the same in all layers are looked up once a step, as they were plain mixes'."""
        super().set_rows(index, uniform)
        self._uniform = uniform
        if index is None:
            self.fusion_rows.fill_(1.0)
        elif uniform:
            tokens = self.fusion_index[: len(index)]
            torch.index_select(self.fusion_store.rows[0], 0, tokens, out=self.fusion_rows[: len(index)])

    def _look_up(
        self, rows: torch.Tensor | None, index: torch.Tensor | None, tokens: int, coordinates: slice
    ) -> torch.Tensor:
        """Weights of a step's tokens, of those in `index` alone where there is one, in a layer of these `rows`.

        [tokens, 1 or slices, coordinates].
        """
        if self._uniform:
            if index is None:
                return self.fusion_rows[:tokens, None, coordinates]
            return self.fusion_rows[index, None, coordinates]
        places = self.fusion_index[:tokens]
        places = places if index is None else places[index]
        return _check_rows(rows).index_select(1, places).transpose(0, 1)[..., coordinates]

    def _pack_layer(
        self, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], widths: tuple[int, ...], slot: int
    ) -> PackedLayer | None:
        key = (a[0].data_ptr(), slot)
        ready = self.fusion_packs.get(self._slot_ids[slot] or 0)
        if ready is not None and key[0] in ready:
            return ready[key[0]]
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
        for active in self._active:
            layer = self._pack_layer(lora_a_stacked, lora_b_stacked, output_slices, active.slot)
            if layer is None:
                continue
            blocks = layer.blocks
            if blocks is not None and scale == 1.0 and self._is_for_kernel(y, x, blocks):
                if self._uniform:
                    add_update(y, x, blocks, self._all_rows, self._positions, active.tokens)
                else:
                    rows_ = _check_rows(rows).numpy()
                    add_update(y, x, blocks, rows_, self.fusion_index.numpy(), active.tokens)
            else:
                self._add_products(y, x, layer, scale, active.index, rows)

    def _is_for_kernel(self, y: torch.Tensor, x: torch.Tensor, blocks: Blocks) -> bool:
        tokens = self.indices_len[0]
        return (
            tokens is not None
            and tokens <= self._most_tokens
            and x.shape == (tokens, blocks.d_in)
            and y.shape == (tokens, blocks.d_out)
            and x.dtype == y.dtype == torch.float32
            and x.is_contiguous()
            and y.is_contiguous()
        )

    def _add_products(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        layer: PackedLayer,
        scale: float,
        index: torch.Tensor | None,
        rows: torch.Tensor | None,
    ) -> None:
        """`add_lora_linear` for one slot, by matrix products."""
        inputs = x if index is None else x[index]
        coordinates = torch.nn.functional.linear(inputs, layer.a).float().view(-1, layer.slices, layer.rank)
        weights = self._look_up(rows, index, x.size(0), slice(layer.first, layer.first + layer.rank))
        coordinates.mul_(weights)
        if layer.may_overflow:  # zero times infinity would be NaN
            coordinates.masked_fill_(weights == 0, 0.0)
        if scale != 1.0:
            coordinates.mul_(scale)
        update = coordinates.view(-1, layer.slices * layer.rank).to(y.dtype)
        for part in layer.parts:
            outputs, own = y[:, part.outputs], update[:, part.coordinates]
            if index is None:
                outputs.addmm_(own, part.b_t)
            else:
                outputs.index_add_(0, index, own @ part.b_t)

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
        for active in self._active:
            slot, index = active.slot, active.index
            key = (lora_b_stacked.data_ptr(), slot)
            if key not in self._embeddings:
                self._embeddings[key] = pack_embedding(lora_b_stacked, slot)
            b_t = self._embeddings[key]
            if b_t is None:
                continue
            inputs = x if index is None else x[index]
            coordinates = inputs[:, : b_t.size(0)].float()
            weights = self._look_up(self.fusion_store.rows[:1], index, x.size(0), slice(b_t.size(0)))[:, 0]
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
        slots_ = [active.slot for active in self._active]
        layers = {slot: self._pack_head(lora_a_stacked, lora_b_stacked, slot) for slot in slots_}
        if not any(layers.values()):
            return
        slots = self._find_slots(x)
        for slot, layer in layers.items():
            index = (slots == slot).nonzero()[:, 0]
            if layer is None or not len(index):
                continue
            update = torch.nn.functional.linear(x[index], layer.a).float().mul_(scale).to(y.dtype)
            (part,) = layer.parts
            y.index_add_(0, index, (update @ part.b_t.to(y.dtype))[:, : y.size(1)])

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


def _check_rows(rows: torch.Tensor | None) -> torch.Tensor:
    if rows is None:
        raise RuntimeError("a LoRA layer has no rows of its own, but this step has weights by module")
    return rows
