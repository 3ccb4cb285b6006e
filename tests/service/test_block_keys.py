"""Key-value blocks in vLLM's own hasher: shared where the same weights act, and nowhere else."""

import inspect
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.request import Request

from adapters import PROMPT
from service.engine import block_keys
from service.engine.names import mix_name
from service.engine.weights import Phase, Weights, function_name

BLOCK = 4
PROMPT_TOKENS = list(range(100, 114))
ANSWER = list(range(200, 210))
ONE, OTHER, NONE = [0.5, 0.25], [1.0, 0.0], [0.0, 0.0]


NAME = "generate_block_hash_extra_keys"
STOCK = inspect.unwrap(kv_cache_utils.generate_block_hash_extra_keys)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    kv_cache_utils.init_none_hash(sha256)
    for module in (kv_cache_utils, block_pool):
        monkeypatch.setattr(module, NAME, STOCK)
    block_keys.install()


def lora(*phases: tuple[int, Any], path: str = "/stack") -> LoRARequest:
    weights = Weights((2, 2), tuple(Phase(start, values) for start, values in phases))
    return LoRARequest(function_name("stack", weights), 7, path)


def hashes(request: LoRARequest | None, prompt: list[int] = PROMPT_TOKENS, answer: list[int] = ANSWER) -> list[Any]:
    """Of all full blocks, the answer's as they come."""
    hasher = kv_cache_utils.get_request_block_hasher(BLOCK, sha256)
    sampling = SamplingParams(max_tokens=64)
    own = Request("r", prompt, sampling, None, lora_request=request, block_hasher=hasher)
    for token in answer:
        own.append_output_token_ids(token)
    return list(own.block_hashes)


def shared(one: list[Any], other: list[Any]) -> int:
    """How many blocks one finds in the cache that the other has left there."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_a_plain_mix_and_a_phase_of_equal_weights_share_blocks() -> None:
    plain = hashes(LoRARequest(mix_name("stack", [(2, 0.5), (2, 0.25)]), 7, "/stack"))
    assert plain == hashes(lora((PROMPT, ONE))) == hashes(lora((PROMPT, ONE), (0, ONE)))
    assert shared(plain, hashes(lora((PROMPT, ONE), (0, OTHER)))) == 3  # 14 tokens: blocks to 12, the last from 13 on
    assert shared(plain, hashes(lora((PROMPT, OTHER)))) == 0
    assert shared(plain, hashes(lora((PROMPT, ONE), path="/other"))) == 0


def test_the_first_position_that_differs_ends_what_is_shared() -> None:
    base = hashes(lora((PROMPT, ONE)))
    for start in range(10):
        block = (len(PROMPT_TOKENS) - 1 + start) // BLOCK
        assert shared(base, hashes(lora((PROMPT, ONE), (start, OTHER)))) == min(block, len(base))


def test_an_answer_only_mix_shares_the_prompt_with_the_base() -> None:
    base, answer = hashes(None), hashes(lora((PROMPT, NONE), (0, ONE)))
    assert shared(base, answer) == 3
    assert hashes(lora((PROMPT, NONE))) == base
    assert shared(answer, hashes(lora((PROMPT, NONE), (0, OTHER)))) == 3


def test_the_next_turn_reuses_the_prompt_and_not_the_answer() -> None:
    mix = lora((PROMPT, ONE), (0, OTHER))
    turn, following = hashes(mix), hashes(mix, [*PROMPT_TOKENS, *ANSWER, 1, 2, 3, 4], [])
    assert shared(turn, following) == 3
    plain = lora((PROMPT, ONE))
    assert shared(hashes(plain), hashes(plain, [*PROMPT_TOKENS, *ANSWER, 1, 2, 3, 4], [])) == 6


def test_other_adapters_keep_vllms_own_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = (LoRARequest("~build/x", 8, "/x"), None)
    own = [hashes(request) for request in requests]
    monkeypatch.setattr(kv_cache_utils, NAME, STOCK)
    assert [hashes(request) for request in requests] == own


def test_with_vllms_own_keys_the_next_turn_would_reuse_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache_utils, NAME, STOCK)
    mix = lora((PROMPT, ONE), (0, OTHER))
    assert shared(hashes(mix), hashes(mix, [*PROMPT_TOKENS, *ANSWER, 1, 2, 3, 4], [])) == 6


def test_vllms_function_is_replaced_wherever_it_is_known_and_once() -> None:
    own = kv_cache_utils.generate_block_hash_extra_keys
    assert own is block_pool.generate_block_hash_extra_keys is not STOCK
    block_keys.install()
    assert kv_cache_utils.generate_block_hash_extra_keys is own
