"""Prompts without their last token in vLLM's own prefix cache: who finds them, and when they are gone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import Request, RequestStatus

from adapters import PROMPT
from service.engine import block_keys
from service.engine.tails import ShareTails, Tails, make_tails
from service.engine.weights import Phase, Weights, function_name

BLOCK, BLOCKS = 4, 12
NONE, ONE, OTHER = [0.0, 0.0], [0.5, 0.25], [1.0, 0.0]
GATE, ANSWER, FADING = ((PROMPT, NONE), (0, OTHER)), ((PROMPT, NONE), (0, ONE)), ((PROMPT, NONE), (0, ONE), (3, OTHER))
MIX, MIXED_PROMPT, LATER = ((PROMPT, ONE),), ((PROMPT, ONE), (0, OTHER)), ((PROMPT, NONE), (1, ONE))
NAME = "generate_block_hash_extra_keys"


@pytest.fixture(autouse=True)
def own_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    kv_cache_utils.init_none_hash(sha256)
    for module in (kv_cache_utils, block_pool):
        monkeypatch.setattr(module, NAME, getattr(module, NAME))  # back to what it is now
    block_keys.install()


class Cache:
    """vLLM's manager of key-value blocks, with tails."""

    def __init__(self) -> None:
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        config = KVCacheConfig(BLOCKS + 1, [], [KVCacheGroupSpec(["layer"], spec)])
        self.manager = KVCacheManager(config, 64, BLOCK, BLOCK, log_stats=True)
        self.tails = Tails(self.manager, BLOCK, "sha256")
        self.hasher = kv_cache_utils.get_request_block_hasher(BLOCK, sha256)
        self.count = 0

    def make(self, phases: Any, prompt: list[int], **options: Any) -> Request:
        self.count += 1
        lora = None
        if phases is not None:
            weights = Weights((2, 2), tuple(Phase(start, values) for start, values in phases))
            lora = LoRARequest(function_name("stack", weights), 7, "/stack")
        sampling = SamplingParams(max_tokens=8, **options.pop("sampling", {}))
        return Request(str(self.count), prompt, sampling, None, lora_request=lora, block_hasher=self.hasher, **options)

    def find(self, request: Request) -> tuple[Any, int]:
        blocks, count, boundary = self.manager.get_computed_blocks(request)
        blocks, count, *others = self.tails.extend(request, (blocks, count, boundary, False))
        assert others == [0, False]
        return blocks, count

    def begin(self, phases: Any, prompt: list[int], **options: Any) -> tuple[Request, int]:
        """Schedule all of a request's prompt; gives how many of its tokens were there."""
        request = self.make(phases, prompt, **options)
        blocks, count = self.find(request)
        given = self.manager.allocate_slots(request, len(prompt) - count, count, blocks)
        assert given is not None
        request.num_computed_tokens = len(prompt)
        return request, count

    def end(self, request: Request, status: RequestStatus = RequestStatus.FINISHED_LENGTH_CAPPED) -> None:
        request.status = status
        self.tails.keep(request)
        self.manager.free(request)

    def copies(self) -> list[tuple[int, int]]:
        """(source, copy) of the blocks that the workers have to copy; both are let go as after the step."""
        copies, held = self.manager.take_kv_cache_block_copies()
        self.manager.block_pool.free_blocks(held)
        return [(copy.src_block_id, copy.dst_block_id) for copy in copies]

    def ask(self, phases: Any, prompt: list[int], **options: Any) -> int:
        request, count = self.begin(phases, prompt, **options)
        self.copies()
        self.end(request)
        return count


def prompt(length: int) -> list[int]:
    return list(range(100, 100 + length))


@pytest.mark.parametrize("length", range(1, 14))
def test_an_answer_after_its_gate_computes_one_position_in_a_block_of_its_own(length: int) -> None:
    cache = Cache()
    gate, _ = cache.begin(GATE, prompt(length))
    (held,) = cache.manager.get_block_ids(gate.request_id)
    cache.end(gate)
    answer, count = cache.begin(ANSWER, prompt(length))
    (own,) = cache.manager.get_block_ids(answer.request_id)
    whole = (length - 1) // BLOCK
    assert count == length - 1
    assert own[:whole] == held[:whole]
    assert own[whole] != held[whole] or (length - 1) % BLOCK == 0
    assert cache.copies() == ([(held[whole], own[whole])] if (length - 1) % BLOCK else [])
    cache.end(answer)
    assert cache.manager.block_pool.get_num_free_blocks() == BLOCKS, "nothing is held for good"


@pytest.mark.parametrize("length", [3, 4, 5, 7, 8, 10])
def test_only_equal_weights_and_tokens_before_the_last_position_share_it(length: int) -> None:
    cache = Cache()
    cache.ask(GATE, prompt(length))
    whole = (length - 1) // BLOCK * BLOCK
    assert cache.ask(MIXED_PROMPT, prompt(length)) == 0
    assert cache.ask(MIXED_PROMPT, prompt(length)) == length - 1
    assert cache.ask(FADING, prompt(length)) == length - 1
    assert cache.ask(ANSWER, [*prompt(length - 1), 7]) == length - 1, "the last token is not in it"
    assert cache.ask(ANSWER, [*prompt(length - 2), 7, 8]) == (length - 2) // BLOCK * BLOCK
    for phases in (None, LATER):
        assert cache.ask(phases, prompt(length)) == whole, "they look for full blocks only"
    assert cache.ask(GATE, prompt(length), cache_salt="other") == 0


def test_a_longer_prompt_shares_full_blocks_only() -> None:
    cache = Cache()
    cache.ask(GATE, prompt(8))
    assert cache.ask(GATE, prompt(12)) == 4
    assert cache.ask(ANSWER, prompt(12)) == 11
    assert cache.ask(ANSWER, prompt(13)) == 8, "the block with the 12th token was computed with the answer's weights"


def test_prompts_that_were_not_computed_leave_nothing() -> None:
    for status in (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR, RequestStatus.FINISHED_IGNORED):
        cache = Cache()
        gate, _ = cache.begin(GATE, prompt(7))
        cache.end(gate, status)
        assert cache.ask(ANSWER, prompt(7)) == 4
    cache = Cache()
    gate, _ = cache.begin(GATE, prompt(7))
    cache.manager.free(gate)  # preempted
    cache.end(gate)
    assert cache.ask(ANSWER, prompt(7)) == 4


def test_who_wants_the_prompts_log_probabilities_computes_it() -> None:
    cache = Cache()
    cache.ask(GATE, prompt(7))
    assert cache.ask(ANSWER, prompt(7), sampling={"prompt_logprobs": 1}) == 0
    assert cache.ask(ANSWER, prompt(3), sampling={"prompt_logprobs": 1}) == 0


def test_the_key_goes_with_its_block() -> None:
    cache = Cache()
    pool = cache.manager.block_pool
    cache.ask(GATE, prompt(8))
    assert (len(pool.cached_block_hash_to_block), len(pool.cached_block_hashes_by_block)) == (3, 1)
    for i in range(5):
        cache.ask(None, [i] * (BLOCKS * BLOCK))  # all blocks are used for others
    assert cache.ask(ANSWER, prompt(8)) == 0
    assert cache.manager.reset_prefix_cache()
    assert not pool.cached_block_hashes_by_block
    assert len(pool.cached_block_hash_to_block) == 0
    cache.ask(GATE, prompt(7))
    assert cache.ask(ANSWER, prompt(7)) == 6
    pool.evict_blocks(set(range(1, BLOCKS + 1)))  # as of a request that overflowed
    assert cache.ask(ANSWER, prompt(7)) == 0


def test_many_prompts_keep_no_more_keys_than_there_are_blocks() -> None:
    cache = Cache()
    for i in range(100):
        cache.ask(GATE, [i, *prompt(7)])
        cache.ask(ANSWER, [i, *prompt(7)])
    pool = cache.manager.block_pool
    assert pool.get_num_free_blocks() == BLOCKS
    keys = sum(block.block_hash is not None for block in pool.blocks)
    assert len(pool.cached_block_hashes_by_block) <= keys <= BLOCKS


def scheduler(**changes: Any) -> Any:
    manager = Cache().manager
    values: dict[str, Any] = {
        "enable_kv_cache_events": False,
        "connector": None,
        "speculative_config": None,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
    }
    values |= changes
    manager.enable_kv_cache_events = values["enable_kv_cache_events"]
    if window := values.get("sliding_window"):
        spec = SlidingWindowSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=window
        )
        manager = KVCacheManager(KVCacheConfig(9, [], [KVCacheGroupSpec(["layer"], spec)]), 64, BLOCK, BLOCK)
    if values.get("off"):
        manager = KVCacheManager(manager.kv_cache_config, 64, BLOCK, BLOCK, enable_caching=False)
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**values),
        speculative_config=values["speculative_config"],
        cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256"),
    )
    return SimpleNamespace(
        kv_cache_manager=manager, vllm_config=config, connector=values["connector"], block_size=BLOCK
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_kv_cache_events": True},
        {"connector": object()},
        {"speculative_config": object()},
        {"decode_context_parallel_size": 2},
        {"prefill_context_parallel_size": 2},
        {"sliding_window": 8},
        {"off": True},
    ],
)
def test_engines_that_keep_blocks_in_other_ways_have_no_tails(changes: dict[str, Any]) -> None:
    assert make_tails(scheduler(**changes)) is None
    assert make_tails(scheduler()) is not None


HIT = "_get_local_prefix_cache_hit"


class _Limited:
    """vLLM 0.33's, which is asked for hits up to a limit; None for no limit."""

    def _get_local_prefix_cache_hit(self, request: str, most: int | None = None) -> tuple[str, int | None]:
        return request, most


def test_a_hit_with_a_limit_is_not_extended() -> None:
    class Scheduler(ShareTails, _Limited):  # type: ignore[misc]  # stands in for vLLM's
        def __init__(self) -> None:
            self.fusion_tails: Any = SimpleNamespace(extend=lambda request, hit: ("extended", *hit))

    find: Any = getattr(Scheduler(), HIT)
    assert find("request") == ("extended", "request", None)
    assert find("request", None) == ("extended", "request", None)
    assert find("request", 3) == ("request", 3)
