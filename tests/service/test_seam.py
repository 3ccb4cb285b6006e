"""The seam in this process: weight rows, the CPU layers against vLLM's own, what the V1 and V2 runners keep."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.v1.worker.gpu.lora_utils import LoraState
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from service.engine import seam
from service.engine.names import mix_name, weight_row
from service.engine.punica import MixedPunicaCPU
from service.engine.supported import UnknownVllmError, check_version

MAX_TOKENS, RANK, D_IN = 32, 8, 24
SLICES = (16, 8, 8)


def mix(*spans: tuple[int, float], id_: int = 7) -> LoRARequest:
    return LoRARequest(mix_name("stack", spans), id_, "/path")


def plain(id_: int = 8) -> LoRARequest:
    return LoRARequest("~build/key", id_, "/path")


def test_rows_repeat_each_requests_weights_over_its_tokens() -> None:
    rows = seam.step_rows([mix((2, 0.5), (1, -2.0)), None, plain()], np.array([2, 1, 2]), 4)
    assert rows.dtype == np.float32
    expected = [[0.5, 0.5, -2, 0]] * 2 + [[0, 0, 0, 0]] + [[1, 1, 1, 1]] * 2
    assert np.array_equal(rows, np.array(expected, dtype=np.float32))


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


def test_the_v2_runner_counts_stacks_by_id_and_remembers_the_rows() -> None:
    patched: Any = type("Patched", (LoraState,), dict(vars(LoraState)))
    seam.patch_v2_state(patched)
    state = patched(4)
    requests = {"a": mix((2, 0.1)), "b": mix((2, 0.9)), "c": None, "d": plain()}
    for i, (name, request) in enumerate(requests.items()):
        state.add_request(name, i, request)
    order = ["d", "b", "c", "a"]
    _, tokens, active = state.make_lora_inputs(order, np.array([3, 1, 2, 0]), np.array([1, 2, 1, 1]))
    assert tokens == (8, 7, 7, 0, 7)
    assert sorted(r.lora_int_id for r in active) == [7, 8]
    step_requests, counts = state.fusion_step
    rows = seam.step_rows(step_requests, counts, 2)
    assert np.allclose(rows[:, 0], [1, 0.9, 0.9, 0, 0.1])


def test_the_v1_runner_writes_rows_each_step_and_resets_them_for_dummy_runs() -> None:
    patched: Any = type("Patched", (LoRAModelRunnerMixin,), dict(vars(LoRAModelRunnerMixin)))
    seam.patch_runner(patched)
    runner = patched()
    punica = SimpleNamespace(fusion_rows=torch.full((6, 2), 9.0))
    adapters = SimpleNamespace(punica_wrapper_mapping={"lm": punica}, supports_mm=False)
    runner.lora_manager = SimpleNamespace(_adapter_manager=adapters, set_active_adapters=lambda *_: None)
    runner.requests = {"a": SimpleNamespace(lora_request=mix((1, 0.25), (1, 4.0)))}
    batch = SimpleNamespace(req_ids=["a"], make_lora_inputs=lambda *_: ((7,), (7, 7), set()))
    runner.set_active_loras(batch, np.array([2]))
    assert torch.equal(punica.fusion_rows[:2], torch.tensor([[0.25, 4.0]] * 2))
    runner._set_active_loras((), (), set())
    assert torch.equal(punica.fusion_rows, torch.ones(6, 2))


def test_a_vllm_that_moved_something_is_named() -> None:
    with pytest.raises(UnknownVllmError, match=r"0\.33\.0.*0\.32\.0"):
        check_version("0.33.0")
    with pytest.raises(UnknownVllmError, match="make_lora_inputs"):
        seam.patch_v2_state(type("LoraState", (), {}))
    check_version("0.32.0+cpu")
