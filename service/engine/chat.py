"""Chat templates of profiles in the place of the base's: what vLLM's renderer asks about a template, and its text.

The text comes from `templates`, whose children render it; vLLM sees none of the client's template, since it parses
and compiles every template it sees on the event loop or in its renderer's only thread.
"""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.renderers import hf

from service.engine.models import served_model
from service.engine.supported import require
from service.engine.templates import (
    SWITCHED_OFF,
    ClientTemplate,
    TemplateError,
    TemplateRenderer,
    TemplatesBusyError,
)

Preprocess = Callable[..., Awaitable[Any]]
RENDERED = "{{ fusion_text }}"
"""The template with which vLLM's renderer passes on a text that a child has made."""
ARGUMENTS = ("documents", "add_generation_prompt", "continue_final_message")
"""Arguments of `apply_chat_template` that the text depends on, besides the variables of a template."""
RESERVED_ARGUMENTS = frozenset(
    {
        *("chat_template", "conversation", "conversations", "messages", "model_config", "tokenizer", "self"),
        *("tokenize", "tokenizer_kwargs", "padding", "truncation", "max_length", "return_dict", "return_tensors"),
        *("return_assistant_tokens_mask", "compiled_template"),
    }
)
"""Keys of `chat_template_kwargs` that would not reach a template but change how vLLM calls the tokenizer."""

client_template: ContextVar[ClientTemplate | None] = ContextVar("fusion_template", default=None)
"""The template of the request at hand, opened."""


async def _reach(answer: Awaitable[Any]) -> Any:
    """The renderer's answer, or its error as one that vLLM answers with the right status."""
    try:
        return await answer
    except TemplateError as error:
        raise VLLMClientError(f"The profile's chat template cannot be used: {error}.") from error
    except TemplatesBusyError as error:
        raise GracefulHTTPError(f"{str(error).capitalize()}.", HTTPStatus.SERVICE_UNAVAILABLE) from error


def open_template(preprocess: Preprocess, templates: TemplateRenderer | None) -> Preprocess:
    """vLLM's `preprocess_chat` that opens the template of the request's profile first."""

    async def chat(*args: Any, **kwargs: Any) -> Any:
        current = served_model.get()
        if current is None or current.chat_template is None:
            return await preprocess(*args, **kwargs)
        if templates is None:
            raise VLLMClientError(f"The profile has a chat template of its own, but {SWITCHED_OFF}.")
        token = client_template.set(await _reach(templates.open(current.chat_template)))
        try:
            return await preprocess(*args, **kwargs)
        finally:
            client_template.reset(token)

    return chat


def choose_format(resolve: Callable[..., str]) -> Callable[..., str]:
    """vLLM's choice of the form of contents, from what is known about an opened template."""

    def choose(chat_template: str | None, tools: Any, given_format: str, tokenizer: Any, *, model_config: Any) -> str:
        template = client_template.get()
        if template is None:
            return resolve(chat_template, tools, given_format, tokenizer, model_config=model_config)
        return template.content_format if given_format == "auto" else given_format

    return choose


def render_apart(apply: Preprocess, templates: TemplateRenderer) -> Preprocess:
    """vLLM's call of `apply_chat_template`, an opened template's text being made by a child before."""
    require(hf, "_convert_developer_to_system", "_consolidate_system_messages", "_detect_developer_role_support")

    async def render(model_config: Any, tokenizer: Any, conversation: list[Any], **kwargs: Any) -> Any:
        template = client_template.get()
        if template is None:
            return await apply(model_config, tokenizer, conversation, **kwargs)
        if not conversation:
            raise VLLMClientError("'messages' is empty; provide at least one message.")
        if any(turn["role"] == "developer" for turn in conversation) and not hf._detect_developer_role_support(
            template.text
        ):
            conversation = hf._consolidate_system_messages(hf._convert_developer_to_system(conversation))
        names = (template.variables | set(ARGUMENTS)) - RESERVED_ARGUMENTS
        arguments = {**tokenizer.special_tokens_map, **{name: kwargs[name] for name in names if name in kwargs}}
        if kwargs.get("tools") is not None:
            arguments["tools"] = kwargs["tools"]
        text = await _reach(templates.render(template.text, conversation, arguments))
        tokenize = kwargs.get("tokenize", False)
        return await apply(
            model_config, tokenizer, conversation[:1], chat_template=RENDERED, tokenize=tokenize, fusion_text=text
        )

    return render
