"""Beside streams a prompt is computed in parts; nobody's answer changes."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from service.engine.prompt_parts import LEAST_TOKENS, MOST_PARTS, PromptParts
from tests.conftest import BASE_NAME, Server


class Steps:
    """vLLM's scheduler, as far as `PromptParts` changes it: how many tokens the next step may have."""

    def __init__(self, streams: int, *prompts: int, begun: int = 0, **config: Any) -> None:
        self.scheduler_config = SimpleNamespace(async_scheduling=False, long_prefill_token_threshold=0)
        vars(self.scheduler_config).update(config)
        self.current_step, self.max_num_scheduled_tokens = 7, 512
        self.running = [plan(10, 9) for _ in range(streams)]
        if begun:
            self.running.append(plan(begun, 8, is_prefill_chunk=True))
        self.waiting = [plan(tokens) for tokens in prompts]

    def schedule(self) -> tuple[int, int]:
        return self.scheduler_config.long_prefill_token_threshold, self.max_num_scheduled_tokens


def plan(tokens: int, computed: int = 0, *, is_prefill_chunk: bool = False) -> Any:
    """A request of vLLM's scheduler."""
    return SimpleNamespace(
        num_tokens=tokens,
        num_tokens_with_spec=tokens,
        num_computed_tokens=computed,
        is_prefill_chunk=is_prefill_chunk,
        next_decode_eligible_step=0,
    )


def divide(streams: int, *prompts: int, **more: Any) -> tuple[int, int]:
    """The most tokens of one prompt, and of all requests, in the next step; what vLLM was given back is checked."""
    steps: Any = type("Scheduler", (PromptParts, Steps), {})(streams, *prompts, **more)
    before = steps.scheduler_config.long_prefill_token_threshold
    found: tuple[int, int] = steps.schedule()
    assert Steps.schedule(steps) == (before, 512)
    return found


@pytest.mark.parametrize(
    ("streams", "prompts", "begun", "part"),
    [
        (16, [65], 0, LEAST_TOKENS),
        (16, [1600], 0, 1600 // MOST_PARTS),
        (16, [], 808, 800 // MOST_PARTS),
        (4, [200], 0, 50),
        (16, [100, 100], 208, 75),  # five streams for each of the three
    ],
)
def test_a_prompt_comes_in_parts(streams: int, prompts: list[int], begun: int, part: int) -> None:
    assert divide(streams, *prompts, begun=begun) == pytest.approx((part, streams + part), abs=1)


@pytest.mark.parametrize(
    ("streams", "prompts", "more"),
    [
        (0, [65], {}),
        (1, [65], {}),
        (8, [65] * 8, {}),
        (3, [], {}),
        (8, [65], {"async_scheduling": True}),
    ],
)
def test_nothing_is_divided(streams: int, prompts: list[int], more: dict[str, Any]) -> None:
    assert divide(streams, *prompts, **more) == (0, 512)


def test_an_operators_own_threshold_counts() -> None:
    assert divide(16, 65, long_prefill_token_threshold=8) == (8, 512)


def test_those_that_are_left_out_have_no_share() -> None:
    steps: Any = type("Scheduler", (PromptParts, Steps), {})(8, 400)
    for request in steps.running[:6]:
        request.next_decode_eligible_step = steps.current_step + 2
    assert steps.schedule() == (200, 202)


@pytest.mark.anyio
async def test_answers_are_the_same_in_parts(server: Server) -> None:
    """On the real engine: a long prompt of a mix beside streams of other mixes and the base."""
    fixed = {"temperature": 0, "ignore_eos": True, "logprobs": 1}
    models = [f"{weight / 10}*wide + 0.4*narrow" for weight in range(1, 6)] + [BASE_NAME]
    streams = [{"model": model, "prompt": "The oak stool", "max_tokens": 24} for model in models]
    long = [
        {"model": model, "prompt": f"{number}: " + "An order of three chairs. " * 40, "max_tokens": 2}
        for number, model in enumerate(["0.3*wide + 0.5*narrow", "answer(0.7*wide)"])
    ]

    async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> list[float]:
        answer = await http.post("/v1/completions", json=body | fixed)
        return list(answer.raise_for_status().json()["choices"][0]["logprobs"]["token_logprobs"])

    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        alone = [await ask(http, body) for body in streams]
        asked = [asyncio.create_task(ask(http, body)) for body in streams]
        await asyncio.sleep(0.3)
        beside = [await ask(http, {**body, "cache_salt": "beside"}) for body in long]
        together = await asyncio.gather(*asked)
        assert beside == [pytest.approx(await ask(http, body), abs=1e-4) for body in long]
    assert together == [pytest.approx(values, abs=1e-4) for values in alone]
