"""What is replaced in vLLM's API layer, in this process."""

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.launchers.api_server import app_state
from vllm.lora.request import LoRARequest
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine import output_processor

from service.engine import patches
from service.engine.models import (
    FusionModels,
    ServedModel,
    apply_template,
    count_usage,
    meter,
    mix_request,
    served_model,
)
from service.engine.supported import UnknownVllmError, require

STACK = LoRARequest("~stack/" + "0" * 64, 1001, "/path")


def test_what_is_replaced_is_what_vllm_uses_and_is_replaced_once() -> None:
    patches.install()
    chat = OnlineRenderer.preprocess_chat
    patches.install()
    assert OnlineRenderer.preprocess_chat is chat
    assert app_state.OpenAIServingModels is FusionModels
    assert not output_processor.LoRARequestStates(log_stats=True).log_stats


def test_a_name_that_vllm_no_longer_has_is_refused() -> None:
    with pytest.raises(UnknownVllmError, match="output_processor has no LoRARequestStats, Other"):
        require(output_processor, "LoRARequestStates", "LoRARequestStats", "Other")


def test_a_mix_shares_the_id_of_its_stack_and_carries_its_weights_in_the_name() -> None:
    mix = mix_request(STACK, "f" * 64, [(2, 0.5), (3, -1.0)])
    assert (mix.lora_name, mix.lora_int_id) == (f"~mix/{'f' * 24}/2:0.5,3:-1.0", 1001)
    assert mix_request(STACK, "f" * 64, None).lora_name == STACK.lora_name


class Usage:
    """Remembers what it is given."""

    def __init__(self) -> None:
        self.reports: list[tuple[int, int]] = []

    def record_usage(self, prompt: int, completion: int, first_token: float | None) -> None:
        assert first_token is not None
        self.reports.append((prompt, completion))


async def tokens(*_args: Any, **_options: Any) -> AsyncGenerator[Any, None]:
    answers, metrics = [SimpleNamespace(token_ids=[1, 2])], SimpleNamespace(first_token_latency=0.1)
    for _step in range(3):
        yield SimpleNamespace(prompt_token_ids=[1] * 5, outputs=answers, metrics=metrics)


@pytest.mark.parametrize(("read", "completion"), [(3, 6), (1, 2)])
def test_usage_is_reported_once_also_of_an_answer_that_is_broken_off(read: int, completion: int) -> None:
    async def main() -> list[tuple[int, int]]:
        usage = Usage()
        meter.set(usage)
        outputs = count_usage(tokens)()
        for _ in range(read):
            await anext(outputs)
        await outputs.aclose()
        return usage.reports

    assert asyncio.run(main()) == [(5, completion)]


@pytest.mark.parametrize("template", ["{{ messages }}", None])
def test_a_profile_s_chat_template_is_the_default_of_its_own_requests(template: str | None) -> None:
    async def chat(renderer: object, **kwargs: Any) -> Any:
        return kwargs["default_template"]

    async def main() -> Any:
        served_model.set(ServedModel("even", STACK, template))
        return await apply_template(chat)(None, default_template="own")

    assert asyncio.run(main()) == (template or "own")
