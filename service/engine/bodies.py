"""vLLM's validation of requests, with an end: each list in a body is checked up to its first wrong item, and what
answers must match is no longer than can be checked at once.

pydantic reports every fault of every item in every branch of a union. A body of 1.6 MB with 400,000 wrong items makes
tens of millions of reports: minutes of the event loop, and more memory than the machine has.
"""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from functools import partial
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import SchemaValidator, ValidationError
from starlette.routing import BaseRoute
from vllm.exceptions import VLLMClientError, VLLMError
from vllm.v1.structured_output.request import get_structured_output_key

from service.engine.grammars import GrammarChecker
from service.engine.models import Generate
from service.engine.supported import require

log = logging.getLogger("fusion")

SEQUENCES = ("list", "tuple", "set", "frozenset")
PLAIN = ("metadata", "default", "cls", "expected", "serialization")
"""Keys of pydantic's schemas that hold no schema for validation."""


GRAMMAR_CHARS, SCHEMA_CHARS = 16 * 1024, 256 * 1024
"""Characters of what answers must match: a regular expression, grammar, list of choices or tags; or a JSON schema."""


def stop_at_first(schema: Any) -> Any:
    """A pydantic core schema whose sequences stop at their first wrong item."""
    if isinstance(schema, dict):
        bounded = {key: value if key in PLAIN else stop_at_first(value) for key, value in schema.items()}
        return bounded | {"fail_fast": True} if schema.get("type") in SEQUENCES else bounded
    if isinstance(schema, list | tuple):
        return type(schema)(map(stop_at_first, schema))
    return schema


class _Validator:
    """A validator whose own errors are the client's fault: they come from a body of a shape it does not expect."""

    def __init__(self, validator: SchemaValidator) -> None:
        self._validator = validator

    def validate_python(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._validator.validate_python(*args, **kwargs)
        except (ValidationError, VLLMError):
            raise
        except Exception as error:
            log.warning("vLLM cannot validate a body", exc_info=error)
            raise VLLMClientError("A value in the request body has the wrong type.") from error


def bound_validation(routes: Iterable[BaseRoute]) -> None:
    """Have the routes validate their bodies up to the first wrong item of each list."""
    for route in routes:
        for field in route.dependant.body_params if isinstance(route, APIRoute) else ():
            require(field, "_type_adapter")
            adapter = field._type_adapter
            # Not the validators that models already have, which check all items.
            validator = SchemaValidator(stop_at_first(adapter.core_schema), _use_prebuilt=False)
            adapter.validator = _Validator(validator)  # type: ignore[assignment]  # has what FastAPI calls


def bound_grammars(generate: Generate, grammars: GrammarChecker) -> Generate:
    """vLLM's `generate` that refuses what answers cannot match, or what takes too much to compile as `grammars` finds,
    and says so where the grammar's engine gave up in the middle of an answer.
    """

    async def blame_grammar(key: Any, start: Callable[[], AsyncGenerator[Any, None]]) -> AsyncGenerator[Any, None]:
        await grammars.check(key)
        outputs = start()
        try:
            async for output in outputs:
                if output.finished and any(
                    answer.finish_reason == "error" and answer.stop_reason is None for answer in output.outputs
                ):
                    raise VLLMClientError("The output constraint is too complex to be followed; use a simpler one.")
                yield output
        finally:
            await outputs.aclose()

    def bounded(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        wanted = getattr(sampling_params, "structured_outputs", None)
        if wanted is not None and not wanted.all_constraints_none():
            key = get_structured_output_key(wanted)
            limit = SCHEMA_CHARS if wanted.json is not None else GRAMMAR_CHARS
            if len(key[1]) > limit:
                raise VLLMClientError(f"The output constraint has {len(key[1])} characters; the limit is {limit}.")
            return blame_grammar(key, partial(generate, prompt, sampling_params, *args, **kwargs))
        return generate(prompt, sampling_params, *args, **kwargs)

    return bounded


def bound_text(renderer: Any, max_chars: int) -> None:
    """Have vLLM's `renderer` tokenize no text that is longer than any prompt of the model can be.

    vLLM checks this itself, but not for /tokenize and not with `truncate_prompt_tokens`.
    """
    require(renderer, "_tokenize_prompt_async")
    tokenize: Callable[[Any, Any], Awaitable[Any]] = renderer._tokenize_prompt_async

    async def tokenize_bounded(prompt: Any, params: Any) -> Any:
        if (length := len(prompt["prompt"])) > max_chars:
            raise VLLMClientError(f"The prompt has {length} characters; the model's context holds at most {max_chars}.")
        return await tokenize(prompt, params)

    renderer._tokenize_prompt_async = tokenize_bounded
