"""Seam 2 on GPUs: vLLM's wrapper of its Triton kernels, with each token's row of weights.

A module of its own, because the modules it needs import on machines with Triton and a GPU only.
"""

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.utils.torch_utils import direct_register_custom_op

from service.engine.gpu_kernel import add_update
from service.engine.rows import TokenRows, weigh

# To a compiler one step, whose kernels are chosen when it runs.
direct_register_custom_op("fusion_add_update", add_update, ["y"], fake_impl=lambda *args: None)


class MixedPunicaGPU(TokenRows, PunicaWrapperGPU):  # type: ignore[misc]  # final upstream for typing only
    """Dense layers run this service's kernels, all others vLLM's."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self.make_rows(max_num_batched_tokens, kwargs["lora_config"], device)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """y [tokens, d_out] += ((x A^T) * weights * scale) B^T for the tokens of each slot.

        The weights are the tokens' own among `rows` [slices, capacity, rank], this layer's part of the store.
        """
        meta, rows = self.token_mapping_meta, self.fusion_store.rows[:1] if rows is None else rows
        factors = list(lora_a_stacked), list(lora_b_stacked)
        places = self.fusion_index, meta.token_lora_mapping, meta.no_lora_flag_cpu
        torch.ops.vllm.fusion_add_update(y, x, *factors, rows, *places, scale)

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

        The weights are as in `add_lora_linear`; layers whose ranks are sharded call this.
        """
        super().add_shrink(y, x, lora_a_stacked, scale, **kwargs)
        weigh(y, self.fusion_store.rows[:1] if rows is None else rows, self.fusion_index)
