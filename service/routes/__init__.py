"""The service's own HTTP routes, one file a noun; vLLM's lie behind the gate."""

import functools
import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import ApiError, error_response

Handler = Callable[[Request], Awaitable[Response]]


def answers_errors(handler: Handler) -> Handler:
    """Turn what a handler raises into an answer in OpenAI's error shape."""

    @functools.wraps(handler)
    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except Exception as error:
            return error_response(error)

    return answer


async def body_of(request: Request) -> dict[str, Any]:
    """The request's JSON object; 400 when it is none."""
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The request body is not JSON: {error}.") from error
    try:
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # what was stored could never be answered with
        raise ApiError(400, f"The request body holds what JSON in UTF-8 cannot: {error}.") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"The request body must be a JSON object, not {type(body).__name__}.")
    return body


def text_of(body: dict[str, Any], key: str) -> str:
    """A required text of a body."""
    value = body.get(key)
    if not isinstance(value, str) or not value:
        raise ApiError(400, f"{key!r} is missing or no text.", param=key)
    return value


__all__ = ["Handler", "JSONResponse", "answers_errors", "body_of", "text_of"]
