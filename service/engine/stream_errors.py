"""Errors in the middle of a stream, on the two of vLLM's routes that do not pass them on.

`/v1/responses` breaks off (its error has no form that its own check of events knows), and `/v1/messages` reports that
an event could not be read. Here both send an error event with the message, as their APIs describe.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from openai.types.responses import ResponseErrorEvent
from vllm.exceptions import GenerationError

ERROR_CHUNK = 'data: {"error"'


def send_response_errors(events: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    """vLLM's `responses_stream_generator`, ending with an `error` event when the generation failed; `pass_on` has to
    take the place of what it would make of the error.
    """

    async def stream(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        number = 0
        try:
            async for event in events(*args, **kwargs):
                number += 1
                yield event
        except GenerationError as error:
            yield ResponseErrorEvent(
                type="error", code="server_error", message=str(error), param=None, sequence_number=number
            )

    return stream


def pass_on(_self: object, error: GenerationError) -> str:
    """In place of `_convert_generation_error_to_streaming_response`."""
    raise error


def send_message_errors(convert: Callable[..., AsyncIterator[str]]) -> Callable[..., AsyncIterator[str]]:
    """vLLM's `message_stream_converter`, which turns an exception into an `error` event, given one for an error."""

    async def raise_errors(chunks: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
        async for chunk in chunks:
            if isinstance(chunk, str) and chunk.startswith(ERROR_CHUNK):  # vLLM 0.33 passes objects, and errors itself
                raise GenerationError(json.loads(chunk.removeprefix("data: "))["error"]["message"])
            yield chunk

    def stream(self: Any, generator: AsyncIterator[str]) -> AsyncIterator[str]:
        return convert(self, raise_errors(generator))

    return stream
