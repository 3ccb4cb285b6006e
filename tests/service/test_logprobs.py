"""The log-probabilities of one request are bounded: of prompts before it starts, of answers as they come."""

from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind, SamplingParams

from service.engine.logprobs import MAX_KEPT, MAX_LOGPROBS, LogprobCount, bound_logprobs, logprob_count
from tests.conftest import BASE_NAME, Server
from tests.service.loop import watch_loop

VOCABULARY = 50_000


async def run(tokens: int, prompt: int = 4, *, is_streamed: bool = False, **params: Any) -> int:
    """How many outputs of one token come of a request whose answers have so many, `n` of them in one output."""
    kind = RequestOutputKind.DELTA if is_streamed else RequestOutputKind.FINAL_ONLY
    sampling = SamplingParams(max_tokens=tokens, output_kind=kind, **params)

    async def generate(*_: Any) -> AsyncGenerator[Any, None]:
        size = 1 if is_streamed else tokens
        for _step in range(tokens // size):
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1] * size)] * sampling.n)

    count = 0
    async for _ in bound_logprobs(generate, VOCABULARY)({"prompt_token_ids": [1] * prompt}, sampling):
        count += 1
    return count


@pytest.mark.anyio
async def test_answers_may_have_log_probabilities() -> None:
    assert await run(8000) == 1
    assert await run(8000, 8000) == 1
    assert await run(1500, logprobs=20) == 1
    assert await run(1, 8000, prompt_logprobs=1) == 1
    assert await run(8000, is_streamed=True, logprobs=20) == 8000


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("tokens", "prompt", "params", "limit"),
    [
        (1, 8000, {"prompt_logprobs": 20}, MAX_LOGPROBS),
        (1, 1000, {"prompt_logprobs": 1, "n": 128}, MAX_LOGPROBS),
        (1, 4, {"prompt_logprobs": -1}, MAX_LOGPROBS),
        (8000, 4, {"logprobs": 20, "n": 128}, MAX_KEPT),
        (2000, 4, {"logprobs": 20}, MAX_LOGPROBS),
        (8000, 4, {"logprobs": 4, "n": 64, "is_streamed": True}, MAX_KEPT),
    ],
)
async def test_too_many_log_probabilities_are_refused(tokens: int, prompt: int, params: Any, limit: int) -> None:
    with pytest.raises(VLLMClientError, match=f"the limit is {limit}"):
        await run(tokens, prompt, **params)


@pytest.mark.anyio
async def test_all_prompts_of_a_request_count_together() -> None:
    token = logprob_count.set(LogprobCount())
    try:
        for _ in range(2):
            await run(1, 8000, prompt_logprobs=1)
        with pytest.raises(VLLMClientError, match="asks for 48000"):
            await run(1, 8000, prompt_logprobs=1)
    finally:
        logprob_count.reset(token)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [115] * 2000, "max_tokens": 1, "prompt_logprobs": 20},
        {"prompt": [115] * 1000, "max_tokens": 1, "echo": True, "logprobs": 20, "n": 16, "temperature": 1},
        {"prompt": ["x"] * 64, "max_tokens": 2000, "logprobs": 20},
    ],
)
def test_no_request_for_log_probabilities_holds_up_the_event_loop(server: Server, body: dict[str, Any]) -> None:
    with server.http() as client, watch_loop(server) as times:
        answer = client.post("/v1/completions", json={"model": BASE_NAME, **body})
    assert "log-probabilities" in answer.text
    assert max(times) < 3
