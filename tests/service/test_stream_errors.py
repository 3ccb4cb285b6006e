"""Errors in streams whose routes in vLLM lose them."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from vllm.exceptions import GenerationError

from service.engine.stream_errors import pass_on, send_message_errors, send_response_errors


async def collect(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]


async def failing(error: Exception) -> AsyncGenerator[Any, None]:
    """What vLLM does for `/v1/responses`."""
    yield "first"
    try:
        raise error
    except GenerationError as failure:
        yield pass_on(None, failure)


def test_a_response_s_stream_ends_with_an_error_event() -> None:
    first, error = asyncio.run(collect(send_response_errors(failing)(GenerationError("it overflowed"))))
    assert first == "first"
    assert (error.type, error.message, error.sequence_number) == ("error", "it overflowed", 1)
    for other in (ValueError("another"), KeyError("another")):
        with pytest.raises(type(other), match="another"):
            asyncio.run(collect(send_response_errors(failing)(other)))


def test_a_message_s_stream_ends_with_the_error_s_own_words() -> None:
    async def chunks() -> AsyncGenerator[str, None]:
        yield 'data: {"id": 1}\n\n'
        yield f"data: {json.dumps({'error': {'message': 'it overflowed', 'code': 500}})}\n\n"
        yield "data: [DONE]\n\n"

    async def convert(_self: object, generator: AsyncIterator[str]) -> AsyncGenerator[str, None]:
        try:
            async for chunk in generator:
                yield chunk
        except GenerationError as error:
            yield f"event: error {error}"

    events = asyncio.run(collect(send_message_errors(convert)(None, chunks())))
    assert events == ['data: {"id": 1}\n\n', "event: error it overflowed"]


def test_chunks_that_are_objects_are_passed_on() -> None:
    """vLLM 0.33 hands them over unwritten, and sends its errors itself."""

    async def chunks() -> AsyncGenerator[Any, None]:
        yield chunk

    async def convert(_self: object, generator: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
        async for one in generator:
            yield one

    chunk = object()
    assert asyncio.run(collect(send_message_errors(convert)(None, chunks()))) == [chunk]
