"""Seam 2 in this process: the CPU layers against vLLM's own, and the weights of their tokens."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from service.engine.names import mix_name, weight_row
from service.engine.punica import MixedPunicaCPU
from service.engine.rows import RowStore

MAX_TOKENS, RANK, D_IN = 32, 8, 24
SLICES = (16, 8, 8)


@pytest.mark.parametrize("weight", [0.1, -1e-30, 16.0, 1 / 3, 0.0, -0.0])
def test_a_weight_survives_the_name_to_float32(weight: float) -> None:
    row = weight_row(mix_name("stack", [(3, weight)]))
    assert row is not None
    assert np.array_equal(row, np.full(3, weight, dtype=np.float32))


def test_an_ordinary_adapter_has_no_row() -> None:
    assert weight_row("wide") is None


def slots(count: int, dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Stacked factors as vLLM keeps them: per slice [slots, 1, rank, d_in] and [slots, 1, d_out, rank]."""
    torch.manual_seed(0)
    a = tuple(torch.randn(count, 1, RANK, D_IN, dtype=dtype) for _ in SLICES)
    b = tuple(torch.randn(count, 1, width, RANK, dtype=dtype) for width in SLICES)
    return a, b


def wrapper(kind: type[PunicaWrapperCPU], ids: list[int | None], tokens: list[int]) -> Any:
    config = SimpleNamespace(max_lora_rank=RANK, max_loras=len(ids))
    punica = kind(MAX_TOKENS, len(tokens), "cpu", lora_config=config)
    mapping = LoRAMapping(tuple(tokens), tuple(tokens), is_prefill=False)
    punica.update_metadata(mapping, ids, len(ids) + 1, 1000)
    return punica


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ids", "tokens"), [([7], [7] * 6), ([7, 8], [8, 7, 7, 8, 7, 8])])
def test_the_gemm_path_equals_vllms_gather(dtype: torch.dtype, ids: list[int], tokens: list[int]) -> None:
    a, b = slots(len(ids), dtype)
    x = torch.randn(len(tokens), D_IN, dtype=dtype)
    results = []
    for kind in (MixedPunicaCPU, PunicaWrapperCPU):
        y = torch.zeros(len(tokens), sum(SLICES), dtype=dtype)
        wrapper(kind, list(ids), tokens).add_lora_linear(y, x, a, b, 1.0, SLICES)
        results.append(y.float())
    ours, vllms = results
    limit = 1e-4 if dtype is torch.float32 else 0.02 * float(vllms.abs().max())
    assert (ours - vllms).abs().max() <= limit


def test_rows_weigh_the_coordinates_and_base_tokens_get_nothing() -> None:
    a, b = slots(2, torch.float32)
    tokens = [7, 0, 8, 7]
    punica = wrapper(MixedPunicaCPU, [7, 8], tokens)
    rows = torch.rand(len(tokens), RANK)
    punica.fusion_rows[: len(tokens)] = rows
    x, y = torch.randn(len(tokens), D_IN), torch.zeros(len(tokens), sum(SLICES))
    punica.add_lora_linear(y, x, a, b, 1.0, SLICES)
    for i, token in enumerate(tokens):
        expected = torch.zeros(sum(SLICES))
        if token:
            slot = token - 7
            parts = [f_b[slot, 0] @ (rows[i] * (f_a[slot, 0] @ x[i])) for f_a, f_b in zip(a, b, strict=True)]
            expected = torch.cat(parts)
        assert torch.allclose(y[i], expected, atol=1e-5)


@pytest.mark.parametrize(("ids", "tokens"), [([7], [7, 0, 7, 7]), ([7, 8], [7, 0, 8, 7])])
def test_each_slice_has_the_weights_of_its_module(ids: list[int | None], tokens: list[int]) -> None:
    a, b = slots(len(ids), torch.float32)
    punica = wrapper(MixedPunicaCPU, ids, tokens)
    punica.fusion_store = RowStore(["other", "q", "k", "v"], 16, RANK, "cpu")
    punica.fusion_store.rows[:, 1:].uniform_()  # the base keeps its zeros
    index = np.array([5, 0, 9, 5])
    punica.set_rows(index, uniform=False)
    x, y = torch.randn(len(tokens), D_IN), torch.zeros(len(tokens), sum(SLICES))
    punica.add_lora_linear(y, x, a, b, 1.0, SLICES, rows=punica.fusion_store.rows[1:])
    for i, token in enumerate(tokens):
        slot, rows = max(token - 7, 0), punica.fusion_store.rows[1:, index[i]] * (token > 0)
        parts = [f_b[slot, 0] @ (row * (f_a[slot, 0] @ x[i])) for f_a, f_b, row in zip(a, b, rows, strict=True)]
        assert torch.allclose(y[i], torch.cat(parts), atol=1e-5)
    with pytest.raises(RuntimeError, match="no rows of its own"):
        punica.add_lora_linear(y, x, a, b, 1.0, SLICES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("ids", "tokens"), [([7], [7, 0, 7]), ([7, 8], [7, 0, 8])])
def test_an_adapter_that_overflows_does_not_reach_tokens_that_do_not_use_it(
    dtype: torch.dtype, ids: list[int | None], tokens: list[int]
) -> None:
    a, b = slots(len(ids), dtype)
    for factor in a:
        factor[0, 0, : RANK // 2] = torch.finfo(dtype).max
    punica = wrapper(MixedPunicaCPU, ids, tokens)
    rows = torch.ones(len(tokens), RANK)
    rows[1] = 0.0  # the base
    rows[2, : RANK // 2] = 0.0  # a mix with weight 0 for the adapter of huge numbers
    punica.fusion_rows[: len(tokens)] = rows
    x, y = torch.rand(len(tokens), D_IN).to(dtype) + 1, torch.zeros(len(tokens), sum(SLICES), dtype=dtype)
    punica.add_lora_linear(y, x, a, b, 1.0, SLICES)
    assert not y[0].isfinite().any()
    assert not y[1].any()
    assert y[2].isfinite().all()


def test_a_slot_with_another_adapter_is_packed_again() -> None:
    a, b = slots(1, torch.float32)
    x = torch.randn(2, D_IN)
    punica = wrapper(MixedPunicaCPU, [7], [7, 7])
    first, second = torch.zeros(2, sum(SLICES)), torch.zeros(2, sum(SLICES))
    punica.add_lora_linear(first, x, a, b, 1.0, SLICES)
    for factor in b:
        factor *= 2
    punica.update_metadata(LoRAMapping((9, 9), (9, 9), is_prefill=False), [9], 2, 1000)
    punica.add_lora_linear(second, x, a, b, 1.0, SLICES)
    assert torch.allclose(second, 2 * first, atol=1e-4)


def test_tokens_are_ordinary_adapters_where_nothing_is_written() -> None:
    a, b = slots(1, torch.float32)
    punica = wrapper(MixedPunicaCPU, [7], [7, 7])
    x, before, after = torch.randn(2, D_IN), torch.zeros(2, sum(SLICES)), torch.zeros(2, sum(SLICES))
    punica.add_lora_linear(before, x, a, b, 1.0, SLICES)
    punica.set_rows(np.array([0, 0]), uniform=False)
    punica.set_rows(None)
    punica.add_lora_linear(after, x, a, b, 1.0, SLICES)
    assert torch.equal(before, after)
    assert before.any()
