"""`/tokenize` off the event loop: the strings of its tokens, and the JSON of both lists, some tokens at a time.

A body of 1 MB may have a million tokens. vLLM looks up their strings and writes them as JSON in one go each, on the
event loop; here it serves others in between.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.serve.tokenize import api_router
from vllm.entrypoints.serve.tokenize.protocol import TokenizeResponse
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.utils.async_utils import make_async

from service.engine.supported import require

STEP = 8192
"""Tokens at a time: some milliseconds."""


def convert_in_steps(create: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """vLLM's `create_tokenize`, which looks up the strings of tokens in the thread that tokenizes."""

    async def create_in_steps(self: Any, request: Any, raw_request: Any) -> Any:
        answer = await create(self, request.model_copy(update={"return_token_strs": False}), raw_request)
        if request.return_token_strs and isinstance(answer, TokenizeResponse):
            require(self.renderer, "_executor")
            convert = make_async(self.renderer.get_tokenizer().convert_ids_to_tokens, executor=self.renderer._executor)
            answer.token_strs = []
            for start in range(0, len(answer.tokens), STEP):
                answer.token_strs += await convert(answer.tokens[start : start + STEP])
        return answer

    return create_in_steps


class StepwiseJson(JSONResponse):
    """An object as JSON, its long lists written some items at a time."""

    def __init__(self, content: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self._content = content
        super().__init__(None, *args, **kwargs)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        parts = []
        for key, value in self._content.items():
            steps = [_write(step) async for step in _cut(value)] if isinstance(value, list) else None
            text = _write(value) if steps is None else b"[" + b",".join(step[1:-1] for step in steps) + b"]"
            parts.append(_write(key) + b":" + text)
        self.body = b"{" + b",".join(parts) + b"}"
        self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


def _write(value: Any) -> bytes:
    """As Starlette does."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


async def _cut(values: Sequence[Any]) -> AsyncIterator[Sequence[Any]]:
    for start in range(0, len(values), STEP):
        yield values[start : start + STEP]
        await asyncio.sleep(0)


def install() -> None:
    """Have vLLM's routes work so."""
    require(ServingTokenization, "create_tokenize")
    require(api_router, "JSONResponse")
    ServingTokenization.create_tokenize = convert_in_steps(ServingTokenization.create_tokenize)  # type: ignore[method-assign]  # replaced on purpose
    api_router.JSONResponse = StepwiseJson  # type: ignore[misc]  # as above
