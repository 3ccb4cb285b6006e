"""What answers must match (schemas, expressions, grammars), compiled by a child with limits before vLLM sees it.

The library that compiles them, llguidance, bounds the steps of a compiled grammar but not what compiling a schema
takes: one of 60 bytes asks for gigabytes, which ends the process, one of 5 KB takes minutes, and chains of references
overflow the stack. vLLM would compile on the event loop, and again in the engine.
"""

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.v1.structured_output.backend_guidance import serialize_guidance_grammar
from vllm.v1.structured_output.request import StructuredOutputKey, get_structured_output_key

from service.engine.children import ChildError, ChildLimits, Children, ChildrenBusyError

CPU_S, WALL_S = 0.25, 5.0
"""Per grammar. A schema of a thousand properties takes 0.05 s."""
MEMORY_BYTES = 64 * 2**20
MAX_ERROR = 4096
MAX_KNOWN = 64
"""Grammars that are remembered as good."""

checked: ContextVar[StructuredOutputKey | None] = ContextVar("fusion_grammar", default=None)
"""What the request at hand must match, once a child has compiled it."""


class GrammarChecker(Children):
    """Compiles grammars in child processes."""

    def __init__(self, config: Any) -> None:
        super().__init__(
            "service.engine.grammar_child",
            "output constraints",
            ChildLimits(MEMORY_BYTES, MAX_ERROR, CPU_S, WALL_S),
        )
        self._config = config
        """vLLM's `structured_outputs_config`."""
        self._known: dict[StructuredOutputKey, None] = {}
        self._compiling: dict[StructuredOutputKey, asyncio.Task[None]] = {}
        """Under way: all prompts of a request wait for one."""

    async def check(self, key: StructuredOutputKey) -> None:
        """Let this request's answer match `key`; `VLLMClientError` when it cannot be compiled within the limits."""
        if key not in self._known:
            task = self._compiling.get(key)
            if task is None:
                task = self._compiling[key] = self._spawn(self._compile(key))
                task.add_done_callback(lambda _: self._compiling.pop(key, None))
            await asyncio.shield(task)
        checked.set(key)

    async def _compile(self, key: StructuredOutputKey) -> None:
        try:
            grammar = serialize_guidance_grammar(
                *key, self._config.disable_any_whitespace, self._config.disable_additional_properties
            )
        except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
            raise VLLMClientError(f"Invalid grammar specification: {error}") from error
        try:
            await self.ask({"grammar": grammar})
        except ChildError as error:
            raise VLLMClientError(f"The output constraint cannot be used: {error}") from error
        except ChildrenBusyError as error:
            raise GracefulHTTPError(f"{str(error).capitalize()}.", HTTPStatus.SERVICE_UNAVAILABLE) from error
        self._known[key] = None
        if len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]


def skip_checked(validate: Callable[..., None]) -> Callable[..., None]:
    """vLLM's `validate_guidance_grammar` for what no child has compiled."""

    def validate_others(sampling_params: Any, *args: Any, **kwargs: Any) -> None:
        wanted, known = sampling_params.structured_outputs, checked.get()
        if wanted is None or known is None or get_structured_output_key(wanted) != known:
            validate(sampling_params, *args, **kwargs)

    return validate_others
