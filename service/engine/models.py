"""vLLM's view of model names, narrowed to the request at hand.

vLLM looks a request's `model` up in `lora_requests` and echoes `model_name(lora)` in every answer. Here
both read the fusion the service resolved for this request (a context variable), so nothing is ever
registered under the reserved names, unknown names leave no trace, and answers echo the text as typed.
"""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.request import LoRARequest

from service.engine.names import mix_name

Generate = Callable[..., AsyncGenerator[Any, None]]
Preprocess = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What answers one request: `model` as typed, the adapter it stands for, its profile's chat template."""

    model: str
    lora: LoRARequest
    chat_template: str | None = None


def mix_request(resident: Any, key: str, spans: Sequence[tuple[int, float]] | None) -> LoRARequest:
    """What vLLM gets for one request: the loaded `LoRARequest`, for a mix under a name that holds its weights.

    `key` is that of the stack, `spans` are (width, weight) of each of its coordinate ranges; None for a build.
    """
    name = resident.lora_name if spans is None else mix_name(key[:24], spans)
    return LoRARequest(name, resident.lora_int_id, resident.lora_path)


class UsageSink(Protocol):
    """Counts the tokens of each generation, when it ends."""

    def record_usage(self, prompt: int, completion: int, first_token: float | None) -> None:
        """Tokens of the prompt and of all answers; `time.monotonic()` of the first token when known."""


served_model: ContextVar[ServedModel | None] = ContextVar("fusion_served", default=None)
meter: ContextVar[UsageSink | None] = ContextVar("fusion_meter", default=None)


def count_usage(generate: Generate) -> Generate:
    """vLLM's `generate`, reporting to the `UsageSink` of the request it runs for."""

    async def counted(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        outputs, sink = generate(*args, **kwargs), meter.get()
        start, first, prompt, completion = time.monotonic(), None, 0, 0
        try:
            async for output in outputs:
                prompt = len(output.prompt_token_ids or ())
                completion += sum(len(answer.token_ids) for answer in output.outputs)
                if first is None and completion and output.metrics is not None:
                    first = start + output.metrics.first_token_latency
                yield output
        finally:
            await outputs.aclose()
            if sink is not None:
                sink.record_usage(prompt, completion, first)

    return counted


def apply_template(preprocess: Preprocess) -> Preprocess:
    """vLLM's `OnlineRenderer.preprocess_chat`, its default template being that of the request's profile.

    A template in the request's body would not do: vLLM distrusts those, and two of its routes take none.
    """

    async def chat(self: Any, *args: Any, **kwargs: Any) -> Any:
        current = served_model.get()
        if current is not None and current.chat_template is not None:
            kwargs["default_template"] = current.chat_template
        return await preprocess(self, *args, **kwargs)

    return chat


class _RequestLora(Mapping[str, LoRARequest]):
    def __getitem__(self, name: str) -> LoRARequest:
        current = served_model.get()
        if current is None or current.model != name:
            raise KeyError(name)
        return current.lora

    def __iter__(self) -> Iterator[str]:
        # Empty on purpose: vLLM iterates to find per-modality default adapters, and there are none.
        return iter(())

    def __len__(self) -> int:
        return 0


class FusionModels(OpenAIServingModels):
    """Replaces vLLM's model table; it holds the current request's model alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora_requests = _RequestLora()  # type: ignore[assignment]  # reads like vLLM's dict

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        """What the answer's `model` says: the request's own text, or the base's name."""
        current = served_model.get()
        if lora_request is not None and current is not None:
            return current.model
        return str(self.base_model_paths[0].name)


__all__ = [
    "FusionModels",
    "LoRARequest",
    "ServedModel",
    "UsageSink",
    "apply_template",
    "count_usage",
    "meter",
    "mix_request",
    "served_model",
]
