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
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, SlidingWindowSpec

from adapters import AdapterError, LoraAdapter, LoraModule, fuse, make_adapter, parse, plan
from service.engine import runners
from service.engine.overflow import MESSAGE, STOP_REASON, AnswerOverflowError, Overflows, raise_overflows
from service.engine.scheduler import EndOverflows, _drop_results
from service.engine.supported import UnknownVllmError
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


def test_rows_that_are_not_finite_are_found_cleared_and_counted_by_request() -> None:
    hidden = torch.randn(6, 4)
    hidden[1, 2], hidden[3], hidden[5, 0] = INF, NAN, -INF
    hidden[5, 1] = INF
    others = hidden[[0, 2, 4]].clone()
    bad = runners.clear_nonfinite(hidden)
    assert bad.tolist() == [False, True, False, True, False, True]
    assert torch.equal(hidden[[0, 2, 4]], others)
    assert not hidden[bad].any()
    assert runners.count_by_request(bad, torch.tensor([0, 1, 4, 5, 6])).tolist() == [0, 2, 0, 1]


class V1Runner:
    """The two methods that are patched, and what they read."""

    def __init__(self, hidden: Tensor, *, asynchronous: bool) -> None:
        self.hidden = hidden
        self.use_async_scheduling = asynchronous
        self.input_batch = SimpleNamespace(num_reqs=2, req_ids=["a", "b"])
        self.query_start_loc = SimpleNamespace(gpu=torch.tensor([0, 1, 3, 3, 3], dtype=torch.int32))

    def _model_forward(self) -> Tensor:
        return self.hidden

    def _bookkeeping_sync(self, *_args: object) -> tuple[Any, ...]:
        return {}, None, "rest"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_v1_runner_reports_a_request_whose_numbers_are_not_finite(asynchronous: bool) -> None:
    patched: Any = type("Patched", (V1Runner,), dict(vars(V1Runner)))
    runners.patch_v1_runner(patched)
    forward, bookkeep = (vars(patched)[name] for name in ("_model_forward", "_bookkeeping_sync"))
    runner = patched(torch.tensor([[1.0], [NAN], [1.0], [NAN]]), asynchronous=asynchronous)
    assert forward(runner).isfinite().all()
    counts, on_device, rest = bookkeep(runner)
    assert rest == "rest"
    assert (on_device.tolist() if asynchronous else counts) == ([0, 1] if asynchronous else {"a": 0, "b": 1})
    assert bookkeep(runner) == ({}, None, "rest")


def test_the_v2_runner_reports_a_request_whose_numbers_are_not_finite() -> None:
    class Runner:
        def sample(self, hidden_states: Tensor, _batch: object, _grammar: object) -> Any:
            assert hidden_states.isfinite().all()
            return SimpleNamespace(num_nans=None), 1, 2

    runners.patch_v2_runner(Runner)
    batch = SimpleNamespace(num_reqs=2, query_start_loc=torch.tensor([0, 2, 3, 3]))
    output, *others = Runner().sample(torch.tensor([[1.0], [INF], [1.0], [NAN]]), batch, None)
    assert (output.num_nans.tolist(), others) == ([1, 0], [1, 2])


def test_blocks_are_zeroed_for_every_kind_of_attention_and_only_they() -> None:
    runners.zero_new_blocks()
    assert KVCacheConfig(2, [], []).needs_kv_cache_zeroing

    class Runner:
        def _zero_block_ids(self, _ids: list[int]) -> None:
            raise AssertionError

        def _kv_cache_spec_attn_group_iterator(self) -> Any:
            full = FullAttentionSpec(block_size=4, num_kv_heads=1, head_size=8, dtype=torch.float32)
            window = SlidingWindowSpec(block_size=4, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=8)
            for spec, names in ((full, ["one"]), (window, ["two", "same"]), (None, ["state"])):
                yield SimpleNamespace(kv_cache_spec=spec, layer_names=names, kernel_block_stride=0)

    runners.patch_cpu_zeroing(Runner)
    runner: Any = Runner()
    caches = {"one": torch.full((3, 1, 4), NAN), "two": torch.full((6, 1, 2), NAN), "state": torch.full((3, 2), NAN)}
    layers = {**caches, "same": caches["two"]}
    context = {name: SimpleNamespace(kv_cache=cache) for name, cache in layers.items()}
    runner.compilation_config = SimpleNamespace(static_forward_context=context)
    runner.kv_cache_config = SimpleNamespace(num_blocks=3)
    vars(Runner)["_zero_block_ids"](runner, [2, 0])
    for name, zeroed in (("one", [0, 2]), ("two", [0, 1, 4, 5]), ("state", [])):
        rows = [i for i, row in enumerate(caches[name]) if not row.isnan().any()]
        assert rows == zeroed


def test_a_runner_without_what_is_replaced_is_refused() -> None:
    for patch in (runners.patch_v1_runner, runners.patch_v2_runner, runners.patch_cpu_zeroing):
        with pytest.raises(UnknownVllmError, match="has no"):
            patch(type("Runner", (), {}))


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


def test_an_ended_request_is_an_error_that_is_counted() -> None:
    async def answers() -> AsyncGenerator[Any, None]:
        for reason in (None, "end", STOP_REASON):
            yield SimpleNamespace(outputs=[SimpleNamespace(stop_reason=reason)])

    async def main() -> list[Any]:
        given = []
        with pytest.raises(AnswerOverflowError, match="overflowed the range"):
            async for output in raise_overflows(answers, overflows)():
                given.append(output)
        return given

    registry = CollectorRegistry()
    overflows = Overflows(counter=Metrics(registry).overflows)
    assert len(asyncio.run(main())) == 2
    assert (overflows.count, registry.get_sample_value("fusion_nonfinite_requests_total")) == (1, 1.0)
    assert overflows.last is not None
    assert AnswerOverflowError().status_code == 500
    assert str(AnswerOverflowError()) == MESSAGE
