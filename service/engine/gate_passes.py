"""A gate's pass: one token by the base with the gate at the prompt's last position, before a request's own pass.

Up to that position the prompt is the base's, so its key-value blocks are those of every recipe that leaves the prompt
to the base.
"""

import asyncio
import hashlib
import logging
import math
from array import array
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.exceptions import VLLMClientError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams

from service.engine.models import GatePass, Generate, meter, served_model

log = logging.getLogger("fusion")

MAX_READINGS = 4096
"""Of the latest prompts, which are not read again."""


class GateReader:
    """Reads gates: the log-odds of a prompt's next token being 'yes' rather than 'no'."""

    def __init__(self, generate: Generate, timeout_s: float) -> None:
        self._generate = generate
        self._timeout_s = timeout_s
        self._known: OrderedDict[bytes, float] = OrderedDict()

    async def choose(
        self, gate: GatePass, lora: LoRARequest, prompt: Any, request_id: str, priority: int = 0
    ) -> LoRARequest:
        """The adapter that answers `prompt`: as the gate says, or by default when it fails. `lora` is the gate's
        own; its pass has the `priority` of the answer.
        """
        decide = gate.begin()  # before anything is waited for: prompts begin in their order
        key = _identify(gate, prompt)
        value = self._known.get(key) if key is not None else None
        reason = ""
        if value is None:
            try:
                async with asyncio.timeout(self._timeout_s):
                    value = await self._read(gate, lora, prompt, request_id, priority)
            except TimeoutError:
                reason = f"it took more than {self._timeout_s:g} s"
            except Exception as error:
                if not isinstance(error, VLLMClientError):  # the prompt is at fault, as its answer will say
                    log.exception("a gate failed")
                reason = f"it failed with {type(error).__name__}"
            else:
                if not math.isfinite(value):
                    value, reason = None, "its value is not a finite number"
                elif key is not None:
                    self._remember(key, value)
        elif key is not None:
            self._known.move_to_end(key)
        return await decide(value, reason)

    async def _read(self, gate: GatePass, lora: LoRARequest, prompt: Any, request_id: str, priority: int) -> float:
        sampling = SamplingParams(temperature=0.0, max_tokens=1, logprob_token_ids=[gate.yes, gate.no])
        value = math.nan
        # vLLM may change what it gets.
        outputs = self._generate(dict(prompt), sampling, f"{request_id}-gate", lora_request=lora, priority=priority)
        async with aclosing(outputs):
            async for output in outputs:
                step = output.outputs[0].logprobs[0]
                value = step[gate.yes].logprob - step[gate.no].logprob
        return value

    def _remember(self, key: bytes, value: float) -> None:
        self._known[key] = value
        if len(self._known) > MAX_READINGS:
            self._known.popitem(last=False)


def _identify(gate: GatePass, prompt: Any) -> bytes | None:
    """What the gate's value depends on; None for prompts that are not tokens alone, or that share no cache."""
    if not isinstance(prompt, dict) or prompt.get("type") != "token" or prompt.get("cache_salt"):
        return None
    if not (ids := prompt.get("prompt_token_ids")):
        return None
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=16, key=gate.digest.encode()[:64]).digest()


def ask_gates(generate: Generate, reader: GateReader) -> Generate:
    """vLLM's `generate` that asks the request's gate first, if it has one, and answers with the weights it chose."""

    def asked(
        prompt: Any, sampling_params: Any, request_id: str, *args: Any, lora_request: Any = None, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        served = served_model.get()
        gate = served.gate if served is not None else None
        if gate is None or lora_request is None:
            return generate(prompt, sampling_params, request_id, *args, lora_request=lora_request, **kwargs)
        return answer(gate, lora_request, prompt, sampling_params, request_id, *args, **kwargs)

    async def answer(
        gate: GatePass, lora: LoRARequest, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        sink = meter.get()
        if sink is not None:  # what the pass uses must not be let go of while it runs
            sink.begin_usage()
        try:
            chosen = await reader.choose(gate, lora, prompt, request_id, kwargs.get("priority", 0))
            outputs = generate(prompt, sampling_params, request_id, *args, lora_request=chosen, **kwargs)
            async with aclosing(outputs):
                async for output in outputs:
                    yield output
        finally:
            if sink is not None:
                sink.record_usage(0, 0, None)

    return asked
