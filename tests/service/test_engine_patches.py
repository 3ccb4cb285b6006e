"""What is replaced in vLLM's API layer, in this process."""

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.routing import APIRoute
from vllm.entrypoints.launchers.api_server import app_state
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.lora.request import LoRARequest
from vllm.renderers import BaseRenderer, hf
from vllm.v1.engine import output_processor

from service.engine import chat, patches
from service.engine.bodies import bound_text, bound_validation
from service.engine.models import (
    FusionModels,
    ServedModel,
    count_usage,
    meter,
    mix_request,
    served_model,
    start_turns,
)
from service.engine.openapi import text_routes
from service.engine.supported import UnknownVllmError, require
from service.engine.templates import ClientTemplate, TemplateError, TemplatesBusyError

STACK = LoRARequest("~stack/" + "0" * 64, 1001, "/path")


def test_what_is_replaced_is_what_vllm_uses_and_is_replaced_once() -> None:
    patches.install()
    choose = hf.resolve_chat_template_content_format
    patches.install()
    assert hf.resolve_chat_template_content_format is choose
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
        self.begun = 0
        self.answers = 0
        self.gaps = 0

    def begin_usage(self) -> None:
        self.begun += 1

    def begin_answer(self) -> None:
        self.answers += 1

    def refuse(self, message: str) -> None:
        raise AssertionError(message)

    def record_gap(self, gap_s: float, tokens: int) -> None:
        assert gap_s >= 0
        self.gaps += tokens

    def record_usage(self, prompt: int, completion: int, first_token: float | None) -> None:
        assert first_token is not None
        self.reports.append((prompt, completion))


async def tokens(*_args: Any, **_options: Any) -> AsyncGenerator[Any, None]:
    answers = [SimpleNamespace(token_ids=[1, 2], index=0)]
    metrics = SimpleNamespace(first_token_latency=0.1, first_token_ts=1.0, last_token_ts=1.5)
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
        assert (usage.begun, usage.answers, usage.gaps) == (1, 1, completion - 1)
        return usage.reports

    assert asyncio.run(main()) == [(5, completion)]


class Templates:
    """In the place of the renderer's processes: knows any template, and says what it is to render."""

    async def open(self, text: str) -> ClientTemplate:
        if text == "bad":
            raise TemplateError("it never ends")
        return ClientTemplate(text, "openai", frozenset({"style"}))

    async def render(self, text: str, messages: Any, arguments: dict[str, Any]) -> str:
        if text == "busy":
            raise TemplatesBusyError("come again")
        return f"{text} {messages} {sorted(arguments.items())}"


async def apply(model_config: Any, tokenizer: Any, conversation: Any, **kwargs: Any) -> Any:
    return kwargs


async def render(template: str | None, templates: Any, **kwargs: Any) -> Any:
    """What vLLM's renderer is called with for a request of a profile with this template."""
    tokenizer = SimpleNamespace(special_tokens_map={"bos_token": "<s>"})
    turns = [{"role": "developer", "content": "Be brief."}]

    async def preprocess() -> Any:
        return await chat.render_apart(apply, templates)(None, tokenizer, turns, **kwargs)

    served_model.set(ServedModel("even", STACK, template))
    return await chat.open_template(preprocess, templates)()


def test_a_profile_s_template_reaches_vllm_as_the_text_that_a_child_made() -> None:
    kwargs = {"chat_template": "own", "tokenize": False, "style": 1, "other": 2, "padding": 3}
    asked = asyncio.run(render("{{ style }}", Templates(), **kwargs))
    text = "{{ style }} [{'role': 'system', 'content': 'Be brief.'}] [('bos_token', '<s>'), ('style', 1)]"
    assert asked == {"chat_template": chat.RENDERED, "tokenize": False, "fusion_text": text}
    assert asyncio.run(render(None, Templates(), **kwargs)) == kwargs


@pytest.mark.parametrize(
    ("template", "templates", "error", "words"),
    [
        ("bad", Templates(), VLLMClientError, "it never ends"),
        ("busy", Templates(), GracefulHTTPError, "Come again"),
        ("any", None, VLLMClientError, "FUSION_CLIENT_TEMPLATES"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_the_error_of_its_own_request(
    template: str, templates: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        asyncio.run(render(template, templates))


def test_the_form_of_contents_is_that_of_the_opened_template() -> None:
    choose = chat.choose_format(lambda *_args, **_options: "string")
    assert choose(None, None, "auto", None, model_config=None) == "string"
    chat.client_template.set(ClientTemplate("x", "openai", frozenset()))
    assert choose(None, None, "auto", None, model_config=None) == "openai"
    assert choose(None, None, "string", None, model_config=None) == "string"
    chat.client_template.set(None)


WRONG = {
    "/v1/chat/completions": "messages",
    "/v1/responses": "input",
    "/v1/messages": "messages",
    "/tokenize": "messages",
}


@pytest.mark.parametrize("item", [{}, None, 1, {"role": "user", "content": "x", "name": {}}])
def test_a_wrong_item_of_a_body_is_reported_once_however_many_there_are(item: Any) -> None:
    """Before, 400,000 items took all memory of the machine; these 4,000 had 10,000 to 1,000,000 reports."""
    routes = [route for route in text_routes() if getattr(route, "path", "") in WRONG]
    bound_validation(routes)
    assert len(routes) == len(WRONG)
    for route in routes:
        assert isinstance(route, APIRoute)
        (field,) = route.dependant.body_params
        value, faults = field.validate({"model": "x", "max_tokens": 1, WRONG[route.path]: [item] * 4000})
        assert value is not None or 0 < len(faults) < 1000


@pytest.mark.parametrize("value", [True, 7, "x", [[]]])
def test_a_value_that_vllms_validation_fails_at_is_the_client_s_fault(value: Any) -> None:
    (route,) = [route for route in text_routes() if getattr(route, "path", "") == "/v1/completions"]
    bound_validation([route])
    assert isinstance(route, APIRoute)
    (field,) = route.dependant.body_params
    with pytest.raises(VLLMClientError, match="wrong type"):
        field.validate({"model": "x", "prompt": "x", "structured_outputs": value})


def test_generations_of_one_request_start_one_after_the_other() -> None:
    started: list[int] = []

    async def generate(number: int) -> AsyncGenerator[Any, None]:
        started.append(number)
        await asyncio.sleep(3600)  # the start alone is in turn
        yield

    async def run() -> None:
        start_turns.set(asyncio.Lock())
        counted = count_usage(generate)
        tasks = [asyncio.ensure_future(anext(counted(number))) for number in range(100)]
        most, before = 0, 0
        while len(started) < 100:
            await asyncio.sleep(0)
            most, before = max(most, len(started) - before), len(started)
        assert (most, started) == (1, list(range(100)))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


async def test_no_text_is_tokenized_that_no_prompt_can_be(anyio_backend: str) -> None:
    async def tokenize(prompt: Any, params: Any) -> Any:
        return {"prompt_token_ids": [1], **prompt}

    renderer = SimpleNamespace(_tokenize_prompt_async=tokenize)
    bound_text(renderer, 10)
    bounded = renderer._tokenize_prompt_async  # noqa: SLF001 - vLLM's
    assert await bounded({"prompt": "a" * 10}, None)
    with pytest.raises(VLLMClientError, match="The prompt has 11 characters"):
        await bounded({"prompt": "a" * 11}, None)
    require(BaseRenderer, "_tokenize_prompt")  # of which vLLM makes the one that is awaited
