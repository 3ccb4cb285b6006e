"""Overflow without an engine: how large an update may be, what is refused, and what the patched parts of vLLM do."""

import asyncio
import math
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from prometheus_client import CollectorRegistry
from torch import Tensor
from vllm.v1.core.block_pool import BlockPool

from adapters import AdapterError, LoraAdapter, LoraModule, fuse, make_adapter, parse, plan
from service.engine.overflow import MESSAGE, STOP_REASON, AnswerOverflowError, Overflows, raise_ends
from service.engine.scheduler import EndOverflows, _drop_results
from service.engine.slot_waits import SlotWaits
from service.errors import ApiError
from service.metrics import Metrics
from service.norms import INPUT_NORM, Headroom
from service.records import AdapterRecord, now
from service.registry import Registry
from service.resolve import Names
from tests.adapters import samples
from tests.service.conftest import adapter_info, fill

NAN, INF = math.nan, math.inf
KINDS = (torch.float16, torch.bfloat16, torch.float32)


def one_module(a: Tensor, b: Tensor, scaling: float = 1.0) -> LoraAdapter:
    return make_adapter({"model.layers.0.self_attn.q_proj": LoraModule(a, b, scaling)}, None)


@given(seed=st.integers(0, 10**6), weight=st.floats(0.01, 16), kind=st.sampled_from(KINDS))
def test_the_norm_bounds_the_update_and_every_part_of_it(seed: int, weight: float, kind: torch.dtype) -> None:
    adapter = samples.adapter(seed)
    norm = Headroom(kind).check(adapter, max_weight=weight)
    x = torch.nn.functional.normalize(torch.randn(10, dtype=torch.float64), dim=0)
    for module in adapter.modules.values():
        coordinates = module.a.double() @ x[:1].expand(module.shape[1]) / module.shape[1] ** 0.5
        parts = module.scaling * module.b.double() * coordinates
        assert parts.cumsum(1).norm(dim=0).max() <= norm * 1.01


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taken_is_computed_without_overflow_in_its_dtype(kind: torch.dtype) -> None:
    room = Headroom(kind)
    a, b = torch.randn(4, 64), torch.randn(32, 4)
    at_one = room.check(one_module(a, b))
    adapter = one_module(a, b, scaling=0.99 * room.largest_norm / 16 / at_one)
    room.check(adapter, max_weight=16)
    module = adapter.modules["model.layers.0.self_attn.q_proj"]
    x = (INPUT_NORM * torch.nn.functional.normalize(torch.randn(100, 64), dim=1)).to(kind)
    coordinates = (x @ module.a.to(kind).T) * 16
    assert (coordinates @ (module.b.to(kind) * module.scaling).T).isfinite().all()
    with pytest.raises(AdapterError, match=r"weights reach FUSION_MAX_WEIGHT=17.*\[overflow\]"):
        room.check(adapter, max_weight=17)


@pytest.mark.parametrize(
    ("a", "b", "scaling", "kind"),
    [
        (1.0, 1e38, 1.0, torch.float32),
        (1e38, 1e38, 1.0, torch.float32),
        (1e20, 1e20, 1.0, torch.float32),
        (1e38, 1e-38, 1.0, torch.float32),
        (1.0, 1.0, 1e30, torch.float32),
        (1e300, 1.0, 1.0, torch.bfloat16),
        (1.0, 1e300, 1.0, torch.float32),
        (1.0, 1.0, 1e5, torch.float16),
        (1e5, 1e-5, 1.0, torch.float16),
        (1.0, -1e300, 1e-300, torch.float32),
    ],
)
def test_numbers_that_overflow_are_refused_also_when_their_update_would_cancel(
    a: float, b: float, scaling: float, kind: torch.dtype
) -> None:
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    rows, columns = torch.full((2, 8), a, dtype=torch.float64), torch.full((6, 2), b, dtype=torch.float64)
    for adapter in (one_module(rows, columns, scaling), one_module(rows, columns * signs, scaling)):
        with pytest.raises(AdapterError) as caught:
            Headroom(kind).check(adapter, max_weight=16)
        assert caught.value.reason == "overflow"
        assert len(str(caught.value)) < 400


def test_zeros_and_denormals_have_a_norm() -> None:
    tiny = torch.full((2, 8), 1e-310, dtype=torch.float64)
    assert Headroom().check(one_module(tiny, torch.zeros(6, 2)), max_weight=16) == 0.0
    assert Headroom().check(samples.adapter(0, scaling=0.0)) == 0.0


def make_registry(folder: Path, **norms: float) -> Registry:
    registry = Registry(f"sqlite:///{folder / 'registry.sqlite'}", timeout_s=5)
    records = [
        AdapterRecord(n, f"{i:064}", adapter_info(norm=norm), now()) for i, (n, norm) in enumerate(norms.items())
    ]
    return fill(registry, *records)


def test_a_mix_whose_weighted_norms_are_too_large_is_refused_at_its_parameter(tmp_path: Path) -> None:
    names = Names("base", make_registry(tmp_path, a=10.0, b=40.0), max_weight=16, max_norm=100.0)
    assert names.look_up("2*a + -2*b") is not None
    for look_up, value, param in (
        (names.look_up, "3*a + -2*b", "model"),
        (names.resolve_field, "-11*a", "fusion"),
        (names.resolve_field, {"adapters": [{"name": "b", "weight": 3}]}, "fusion"),
    ):
        with pytest.raises(ApiError, match="would overflow") as caught:
            look_up(value)  # type: ignore[operator]  # each takes its own value
        assert (caught.value.status, caught.value.param) == (400, param)
    # Not a plain sum: what is built is checked.
    assert names.look_up("ties(16*a + 16*b, density=0.5)") is not None


def test_old_records_have_no_norm_and_none_with_nan_is_written(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'registry.sqlite'}"
    registry = fill(Registry(url, timeout_s=5), AdapterRecord("a", "0" * 64, adapter_info(), now()))
    assert registry.snapshot.norms == {"0" * 64: 0.0}
    with pytest.raises(ValueError, match="not JSON compliant"):
        fill(registry, AdapterRecord("b", "1" * 64, adapter_info(effect=NAN), now()))
    registry.close()
    assert set(Registry(url, timeout_s=5).adapters) == {"a"}


@pytest.mark.parametrize(
    "recipe",
    ["svd(1*x + 0.5*y, rank=2)", "1*x + 1*y", "ties(1*x + 1*y, density=0.5)", "slerp(1*x + 1*y, from=x, t=0.3)"],
)
def test_numbers_that_cannot_be_fused_are_the_adapters_fault(recipe: str) -> None:
    huge = {
        n: LoraModule(m.a.double() * 1e300, m.b.double() * 1e300, 1.0) for n, m in samples.adapter(0).modules.items()
    }
    adapters = {"x": make_adapter(huge, None), "y": samples.adapter(1)}
    for carry_out in (fuse, plan):
        with pytest.raises(AdapterError, match="overflow"):
            carry_out(parse(recipe), adapters, max_rank=2)


def test_an_ended_request_leaves_nothing_in_the_prefix_cache_nor_in_its_step() -> None:
    pool = BlockPool(num_gpu_blocks=8, enable_caching=True, hash_block_size=4)
    hashes = [bytes([i]) * 32 for i in range(3)]
    request: Any = SimpleNamespace(request_id="a", block_hashes=hashes[:2])
    blocks = pool.get_new_blocks(4)
    for block, number in zip(blocks, (0, 1, 1, 2), strict=True):  # the third is another request's equal block
        owner: Any = SimpleNamespace(block_hashes=hashes[: number + 1])
        pool.cache_full_blocks(owner, [block] * (number + 1), number, number + 1, 4, 0)
    held = [block.block_id for block in blocks[:2]]
    scheduler: Any = SimpleNamespace(kv_cache_manager=SimpleNamespace(block_pool=pool, get_block_ids=lambda _: (held,)))
    vars(EndOverflows)["_evict"](scheduler, request)
    assert [pool.get_cached_block(key, [0]) is None for key in hashes] == [True, True, False]  # type: ignore[arg-type]  # a NewType
    output: Any = SimpleNamespace(
        sampled_token_ids=[[1], [2]],
        req_id_to_index={"a": 1},
        prompt_logprobs_dict={"a": 1, "b": 2},
        prompt_token_id_logprobs_dict={},
    )
    _drop_results(output, "a")
    assert (output.sampled_token_ids, output.prompt_logprobs_dict) == ([[1], []], {"b": 2})


def score(*rows: list[float]) -> Any:
    return SimpleNamespace(logprobs=torch.tensor(rows))


def test_requests_whose_prompts_scores_are_not_finite_end_without_them() -> None:
    scores = {"fine": score([-1.0, -INF]), "none": None, "nan": score([-1.0, -1.0], [-2.0, NAN]), "own": score([-INF])}
    requests = dict.fromkeys(["fine", "none", "nan", "own", "logits"])
    output: Any = SimpleNamespace(
        num_nans_in_logits={"fine": 0, "logits": 2, "gone": 1},
        sampled_token_ids=[],
        prompt_logprobs_dict=scores,
        prompt_token_id_logprobs_dict={},
    )
    ended: list[str] = []

    def finish(ids: list[str], _: object) -> list[Any]:
        ended.extend(ids)
        return []

    scheduler: Any = SimpleNamespace(
        running=[],
        waiting=[],
        lora_config=SimpleNamespace(max_loras=1),
        fusion_slot_waits=SlotWaits(0),
        requests=requests,
        finish_requests=finish,
        _update=lambda *_: {},
        _evict=lambda _: None,
    )
    assert vars(EndOverflows)["update_from_output"](scheduler, None, output) == {}
    assert sorted(ended) == ["logits", "nan", "own"]
    assert sorted(scores) == ["fine", "none"]


def test_an_ended_request_is_an_error_that_is_counted() -> None:
    async def answers() -> AsyncGenerator[Any, None]:
        for reason in (None, "end", STOP_REASON):
            yield SimpleNamespace(outputs=[SimpleNamespace(stop_reason=reason)])

    async def main() -> list[Any]:
        given = []
        with pytest.raises(AnswerOverflowError, match="overflowed the range"):
            async for output in raise_ends(answers, {STOP_REASON: overflows.end})():
                given.append(output)
        return given

    registry = CollectorRegistry()
    overflows = Overflows(counter=Metrics(registry).overflows)
    assert len(asyncio.run(main())) == 2
    assert (overflows.count, registry.get_sample_value("fusion_nonfinite_requests_total")) == (1, 1.0)
    assert overflows.last is not None
    assert AnswerOverflowError().status_code == 500
    assert str(AnswerOverflowError()) == MESSAGE
