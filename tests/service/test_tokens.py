"""`/tokenize` serves others in between, however many tokens a text has."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import JSONResponse
from starlette.types import Message
from vllm.entrypoints.serve.tokenize.protocol import TokenizeCompletionRequest, TokenizeResponse

from service.engine.tokens import STEP, StepwiseJson, convert_in_steps
from tests.conftest import BASE_NAME, Server
from tests.service.loop import watch_loop

pytestmark = pytest.mark.anyio
MANY = 1_000_000
LOOP_S = 0.1


@asynccontextmanager
async def watch_own_loop() -> AsyncIterator[list[float]]:
    """The times between two turns of a task, in this thread's CPU time."""
    times: list[float] = []

    async def tick() -> None:
        last = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            times.append(now - last)
            last = now

    task = asyncio.create_task(tick())
    try:
        yield times
    finally:
        task.cancel()


async def send(response: JSONResponse) -> tuple[dict[bytes, bytes], bytes]:
    messages: list[Message] = []

    async def collect(message: Message) -> None:
        messages.append(message)

    await response({"type": "http"}, lambda: asyncio.sleep(0, {"type": "http.disconnect"}), collect)
    return dict(messages[0]["headers"]), b"".join(message.get("body", b"") for message in messages)


@pytest.mark.parametrize(
    "content",
    [
        {"tokens": [1, 2], "token_strs": ["Ġa", '"', "\n"], "count": 2},
        {"tokens": [], "token_strs": None, "prompt": "é"},
        {"tokens": list(range(3 * STEP)), "error": {"message": "no", "list": [1]}},
    ],
)
async def test_the_json_is_the_same_as_in_one_go(content: dict[str, Any]) -> None:
    expected, got = [await send(kind(content, 201)) for kind in (JSONResponse, StepwiseJson)]
    assert got == expected


async def test_a_million_tokens_keep_no_event_loop() -> None:
    content = {"tokens": list(range(MANY)), "token_strs": ["Ġword"] * MANY}
    async with watch_own_loop() as times:
        _, body = await send(StepwiseJson(content))
    assert json.loads(body) == content
    assert max(times) < LOOP_S


async def test_strings_are_looked_up_some_at_a_time_beside_the_loop() -> None:
    sizes: list[int] = []

    def convert(ids: list[int]) -> list[str]:
        sizes.append(len(ids))
        return [str(token) for token in ids]

    async def create(_self: Any, request: Any, _raw: Any) -> TokenizeResponse:
        assert not request.return_token_strs
        return TokenizeResponse(count=MANY, max_model_len=1, tokens=list(range(MANY)))

    tokenizer = SimpleNamespace(convert_ids_to_tokens=convert)
    with ThreadPoolExecutor(1) as executor:
        renderer = SimpleNamespace(get_tokenizer=lambda: tokenizer, _executor=executor)
        handler = SimpleNamespace(renderer=renderer)
        for wanted in (True, False):
            request = TokenizeCompletionRequest(prompt="x", return_token_strs=wanted)
            answer = await convert_in_steps(create)(handler, request, None)
            assert answer.token_strs == ([str(token) for token in range(MANY)] if wanted else None)
    assert max(sizes) <= STEP


def test_a_long_text_of_many_tokens_holds_up_no_one(server: Server) -> None:
    """Each character is three tokens."""
    body = {"model": BASE_NAME, "prompt": "ᚠ" * 160_000, "return_token_strs": True}
    with server.http() as client, watch_loop(server) as times:
        answer = client.post("/tokenize", json=body)
        assert answer.status_code == 200, answer.text[:300]
        assert answer.json()["count"] == len(answer.json()["token_strs"]) > 300_000
        back = client.post("/detokenize", json={"model": BASE_NAME, "tokens": answer.json()["tokens"]})
        assert back.json()["prompt"] == body["prompt"]
    assert max(times) < 3 * 0.2
