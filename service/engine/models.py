"""vLLM's view of model names, narrowed to the request at hand.

vLLM looks a request's `model` up in `lora_requests` and echoes `model_name(lora)` in every answer. Here
both read the fusion the service resolved for this request (a context variable), so nothing is ever
registered under the reserved names, unknown names leave no trace, and answers echo the text as typed.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.request import LoRARequest

from service.engine.names import mix_name
from service.engine.weights import Weights, function_name

Generate = Callable[..., AsyncGenerator[Any, None]]
Choose = Callable[[float | None, str], Awaitable[LoRARequest]]


@dataclass(frozen=True, slots=True)
class GatePass:
    """What chooses a request's weights: the tokens whose log-probabilities differ by the gate's value, and the digest
    of the gate. `begin()` gives, for one prompt, what chooses the adapter that answers from the value and a reason;
    without a value, by default and for this reason.
    """

    digest: str
    yes: int
    no: int
    begin: Callable[[], Choose]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What answers one request: `model` as typed, the adapter it stands for, its profile's chat template; with a gate,
    the adapter is that of the gate's own pass.
    """

    model: str
    lora: LoRARequest
    chat_template: str | None = None
    gate: GatePass | None = None


def mix_request(
    resident: Any, key: str, weights: Sequence[tuple[int, float]] | Weights | None, public: str | None = None
) -> LoRARequest:
    """What vLLM gets for one request: the loaded `LoRARequest`, for a mix under a name that holds its weights.

    `key` is that of the stack, `weights` are (width, weight) of each of its coordinate ranges or a function; None for
    a build. `public` is the name that events of the key-value cache have.
    """
    if weights is None:
        name = resident.lora_name
    elif isinstance(weights, Weights):
        name = function_name(key[:24], weights)
    else:
        name = mix_name(key[:24], weights)
    return LoRARequest(name, resident.lora_int_id, resident.lora_path, public)


class UsageSink(Protocol):
    """Counts the generations of a request, and the tokens of each when it ends; told when the first tokens are there,
    or why none came.
    """

    def begin_usage(self) -> None:
        """A generation begins; `record_usage` follows, at times only after the request has been answered."""

    def begin_answer(self) -> None:
        """There is a token."""

    def refuse(self, message: str) -> None:
        """A generation could not be done at this time, for the reason in `message`."""

    def record_gap(self, gap_s: float, tokens: int) -> None:
        """Some tokens came, so many seconds after one another."""

    def record_usage(self, prompt: int, completion: int, first_token: float | None) -> None:
        """Tokens of the prompt and of all answers; `time.monotonic()` of the first token when known."""


served_model: ContextVar[ServedModel | None] = ContextVar("fusion_served", default=None)
meter: ContextVar[UsageSink | None] = ContextVar("fusion_meter", default=None)
start_turns: ContextVar[asyncio.Lock | None] = ContextVar("fusion_start_turns", default=None)
"""Held while a generation of the request at hand starts: the event loop serves others between two starts."""


class _Gaps:
    """The time between the tokens of each answer of a generation."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: dict[int, float] = {}

    def record(self, output: Any, sink: UsageSink) -> None:
        """Tell `sink` the gaps before what has come; of what comes whole, those that vLLM has measured."""
        now, stats = time.monotonic(), output.metrics
        for answer in output.outputs:
            if not (tokens := len(answer.token_ids)):
                continue
            if (last := self._last.get(answer.index)) is not None:
                sink.record_gap((now - last) / tokens, tokens)
            elif tokens > 1 and len(output.outputs) == 1 and stats is not None:
                sink.record_gap((stats.last_token_ts - stats.first_token_ts) / (tokens - 1), tokens - 1)
            self._last[answer.index] = now


def count_usage(generate: Generate) -> Generate:
    """vLLM's `generate`, reporting to the `UsageSink` of the request it runs for."""

    async def counted(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        sink = meter.get()
        first, begun, prompt, completion, gaps = None, False, 0, 0, _Gaps()
        if sink is not None:
            sink.begin_usage()
        try:
            # vLLM checks and tokenizes parameters when a generation starts, and starts all of a request at once.
            async with start_turns.get() or asyncio.Lock():
                await asyncio.sleep(0)
            start = time.monotonic()
            async with aclosing(generate(*args, **kwargs)) as outputs:
                async for output in outputs:
                    prompt = len(output.prompt_token_ids or ())
                    completion += sum(len(answer.token_ids) for answer in output.outputs)
                    if first is None and completion and output.metrics is not None:
                        first = start + output.metrics.first_token_latency
                    if sink is not None and completion and not begun:
                        begun = True
                        sink.begin_answer()
                    if sink is not None:
                        gaps.record(output, sink)
                    yield output
        finally:
            if sink is not None:
                sink.record_usage(prompt, completion, first)

    return counted


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
    "Choose",
    "FusionModels",
    "GatePass",
    "LoRARequest",
    "ServedModel",
    "UsageSink",
    "count_usage",
    "meter",
    "mix_request",
    "served_model",
    "start_turns",
]
