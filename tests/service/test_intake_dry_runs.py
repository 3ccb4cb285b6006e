"""The intake before a fusion that must be made: what vLLM would refuse makes nothing, and nothing is computed twice."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from service.engine.dry_run import EVENTS, NO_LORA, stop_dry_runs
from service.engine.models import ServedModel, served_model
from tests.service.intakes import Setup, make_setup


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return make_setup(tmp_path)


def test_what_vllm_refuses_is_refused_before_anything_is_made(setup: Setup) -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        assert json.loads((await receive())["body"]) == {"model": "short", "max_tokens": 7}
        assert served_model.get() == ServedModel("short", NO_LORA, "{{ x }}")
        await PlainTextResponse("no", 418, {"x-reason": "teapot"})(scope, receive, send)

    setup.pool.is_warm, setup.intake._app = False, refuse  # noqa: SLF001 - in the place of vLLM
    answer = setup.post({"model": "short"})
    assert (answer.status_code, answer.text, answer.headers["x-reason"]) == (418, "no", "teapot")
    assert not [key for key in answer.headers if key.startswith("x-fusion")]
    assert (setup.pool.leased, setup.pool.strict, setup.count("short", 418)) == (0, None, 1)


@pytest.mark.parametrize(
    ("event", "status", "error"),
    [
        ({"error": {"message": "no", "param": "stop", "code": 422}}, 422, {"param": "stop", "code": 422}),
        ({"error": {"message": "no"}}, 400, {"param": None, "code": 400}),
        ({"type": "error", "code": "server_error", "message": "no"}, 400, {"param": None, "code": 400}),
        ({"type": "error", "error": {"message": "no", "type": "invalid"}}, 400, {"type": "invalid"}),
    ],
)
def test_what_vllm_refuses_in_a_stream_is_refused_as_well(
    setup: Setup, event: dict[str, Any], status: int, error: dict[str, Any]
) -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        async def events() -> AsyncGenerator[str, None]:
            yield 'event: begin\ndata: {"type": "begin"}\n\n'
            yield f"event: error\ndata: {json.dumps(event)}\n\ndata: [DONE]\n\n"

        await StreamingResponse(events(), media_type="text/event-stream")(scope, receive, send)

    setup.pool.is_warm, setup.intake._app = False, refuse  # noqa: SLF001 - in the place of vLLM
    answer = setup.post({"model": "short"})
    assert (answer.status_code, setup.pool.leased) == (status, 0)
    assert answer.json()["error"].items() >= {"message": "no", **error}.items()


@pytest.mark.parametrize("kind", ["answers", "streams", "computes"])
def test_what_vllm_accepts_is_made_and_answered_once(setup: Setup, kind: str) -> None:
    computed: list[str] = []

    async def compute(prompt: str, params: str) -> AsyncGenerator[str, None]:
        computed.append(prompt)
        yield "token"

    generate = stop_dry_runs(compute, lambda prompt, params: None)

    async def vllm(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        if kind == "answers":
            await PlainTextResponse("fine")(scope, receive, send)
            return
        if kind == "streams":
            head = [(b"content-type", EVENTS)]
            await send({"type": "http.response.start", "status": 200, "headers": head})
        asking = asyncio.create_task(generate("prompt", "params").__anext__())
        leaving: asyncio.Task[Any] = asyncio.ensure_future(receive())
        await asyncio.wait([asking, leaving], return_when=asyncio.FIRST_COMPLETED)
        text = asking.result() if asking.done() else "null"
        asking.cancel()
        leaving.cancel()
        if kind == "computes":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": text.encode()})

    setup.pool.is_warm, setup.intake._app = False, vllm  # noqa: SLF001 - in the place of vLLM
    answer = setup.post({"model": "a"})
    assert (answer.status_code, answer.text) == (200, "fine" if kind == "answers" else "token")
    assert (computed, setup.count("(inline)", 200)) == ([] if kind == "answers" else ["prompt"], 1)
