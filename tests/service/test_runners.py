"""What the workers find and zero: hidden states and logits that are not finite, and blocks that are used again."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, SlidingWindowSpec
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from service.engine import logprob_rows, runners
from service.engine.supported import UnknownVllmError

NAN, INF = math.nan, math.inf
KINDS = (torch.float16, torch.bfloat16, torch.float32)


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


def test_only_nan_and_plus_infinity_are_overflows_of_logits() -> None:
    logits = torch.tensor([[1.0, -INF, 2.0], [NAN, 1.0, 2.0], [-INF, NAN, INF], [INF, 0.0, 1.0], [-INF, -INF, -INF]])
    for kind in KINDS:
        assert runners.find_overflows(logits.to(kind)).tolist() == [False, True, True, True, False]


class V1Runner:
    """The methods that are patched, and what they read: two requests, of one and of two tokens."""

    def __init__(self, hidden: Tensor, logits: Tensor, *, asynchronous: bool, discarded: bool = False) -> None:
        self.hidden = hidden
        self.use_async_scheduling = asynchronous
        self.input_batch = SimpleNamespace(num_reqs=2, req_ids=["a", "b"])
        self.query_start_loc = SimpleNamespace(gpu=torch.tensor([0, 1, 3, 3, 3], dtype=torch.int32))
        self.discard_request_mask = SimpleNamespace(gpu=torch.tensor([False, discarded, False]))
        drafts = SimpleNamespace(num_draft_tokens=[0, 1]) if len(logits) == 3 else None
        self.execute_model_state = SimpleNamespace(logits=logits, spec_decode_metadata=drafts)

    def _model_forward(self) -> Tensor:
        return self.hidden

    def sample_tokens(self, _grammar: object) -> str:
        self.execute_model_state.logits.fill_(-INF)  # as a mask does
        return "sampled"

    def _bookkeeping_sync(self, *_args: object) -> tuple[Any, ...]:
        return {}, None, "rest"


FINE = [[1.0], [1.0], [1.0], [1.0]]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("hidden", "logits", "discarded", "counts"),
    [
        ([[1.0], [NAN], [1.0], [NAN]], [[1.0], [1.0]], False, [0, 1]),
        (FINE, [[1.0], [INF]], False, [0, 1]),
        (FINE, [[NAN], [1.0]], False, [1, 0]),
        (FINE, [[1.0], [1.0], [INF]], False, [0, 1]),
        (FINE, [[1.0], [INF]], True, [0, 0]),
        ([[INF], [1.0], [1.0], [1.0]], [[1.0], [INF]], True, [1, 0]),
    ],
    ids=["hidden", "logits", "NaN", "drafts", "not sampled", "hidden beside not sampled"],
)
def test_the_v1_runner_reports_a_request_whose_numbers_are_not_finite(
    hidden: list[list[float]], logits: list[list[float]], discarded: bool, counts: list[int], asynchronous: bool
) -> None:
    patched: Any = type("Patched", (V1Runner,), dict(vars(V1Runner)))
    runners.patch_v1_runner(patched)
    forward, sample, bookkeep = (
        vars(patched)[name] for name in ("_model_forward", "sample_tokens", "_bookkeeping_sync")
    )
    runner = patched(torch.tensor(hidden), torch.tensor(logits), asynchronous=asynchronous, discarded=discarded)
    assert forward(runner).isfinite().all()
    assert sample(runner, None) == "sampled"
    on_host, on_device, rest = bookkeep(runner)
    assert rest == "rest"
    assert (on_device.tolist() if asynchronous else on_host) == (
        counts if asynchronous else dict(zip("ab", counts, strict=True))
    )
    assert bookkeep(runner) == ({}, None, "rest")


@pytest.mark.parametrize(("drafts", "counts"), [(False, [1, 1, 0]), (True, [1, 1, 0])])
def test_the_v2_runner_reports_a_request_whose_numbers_are_not_finite(drafts: bool, counts: list[int]) -> None:
    sampler = SimpleNamespace(get_num_nans=None)
    logits = torch.tensor([[1.0, -INF], [NAN, 1.0], [NAN, 1.0]])  # the last request is in the midst of its prompt
    if drafts:
        logits = torch.cat([logits[:1], logits])

    class Runner:
        sampler = SimpleNamespace(compute_nans=False)

        def sample(self, hidden_states: Tensor, _batch: object, _grammar: object) -> Any:
            assert hidden_states.isfinite().all()
            assert self.sampler.compute_nans
            found = sampler.get_num_nans(logits)
            return SimpleNamespace(num_nans=found, num_sampled=torch.tensor([1, 1, 0])), 1, 2

    runners.patch_v2_runner(Runner, sampler)
    rows = torch.tensor([0, 2, 3, 4] if drafts else [0, 1, 2, 3])
    batch = SimpleNamespace(num_reqs=3, query_start_loc=torch.tensor([0, 2, 3, 4, 4]), cu_num_logits=rows)
    output, *others = Runner().sample(torch.tensor([[1.0], [INF], [1.0], [1.0], [NAN]]), batch, None)
    assert (output.num_nans.tolist(), others) == (counts, [1, 2])


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


def test_rows_of_log_probabilities_keep_what_each_request_wants() -> None:
    top = LogprobsTensors(torch.tensor([[7, 1, 2, 3], [8, 4, 5, 6]]).int(), -torch.rand(2, 4), torch.tensor([1, 2]))
    some = LogprobsTensors(torch.tensor([[7, 0, 0], [8, 40, 50]]).int(), -torch.rand(2, 3), torch.tensor([1, 2]))
    some.logprobs[0, 1:] = -torch.inf
    for wide, narrow, row in ((top, some, 1), (some, top, 0)):
        merged = logprob_rows.merge(wide, narrow, [row])
        size = narrow.logprobs.shape[1]
        assert merged.logprobs.shape == merged.logprob_token_ids.shape == (2, 4)
        assert merged.logprobs[row, :size].equal(narrow.logprobs[row])
        assert merged.logprob_token_ids[row, :size].equal(narrow.logprob_token_ids[row])
        assert merged.logprobs[row, size:].eq(-torch.inf).all()
        assert merged.logprobs[1 - row, : wide.logprobs.shape[1]].equal(wide.logprobs[1 - row])


def test_the_sampler_gives_each_request_the_log_probabilities_that_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "forward", Sampler.forward)  # to have it back
    logprob_rows.install()
    ones, zeros = torch.ones(2), torch.zeros(2)
    nothing: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None, "generators": {}}
    nothing |= {"prompt_token_ids": None, "allowed_token_ids_mask": None, "bad_words_token_ids": {}}
    nothing |= {"no_penalties": True, "frequency_penalties": zeros, "presence_penalties": zeros}
    nothing |= {"repetition_penalties": ones, "output_token_ids": [[], []], "logitsprocs": LogitsProcessors()}
    wanted = SamplingMetadata(
        all_greedy=True, all_random=False, max_num_logprobs=4, logprob_token_ids={1: [3, 4]}, **nothing
    )
    logits = torch.arange(20.0).reshape(2, 10)
    expected = logits.log_softmax(-1)
    found = Sampler()(logits, wanted).logprobs_tensors
    assert found.logprob_token_ids.tolist() == [[9, 9, 8, 7, 6], [9, 3, 4, 0, 0]]
    assert torch.equal(found.logprobs[0], expected[0, [9, 9, 8, 7, 6]])
    assert torch.equal(found.logprobs[1, :3], expected[1, [9, 3, 4]])
