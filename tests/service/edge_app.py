"""The edge's middlewares before an app that answers 200 to all it is passed, or fails."""

from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from service.callers import Caller
from service.edge.access import Access
from service.edge.check import Check

HERE = "http://127.0.0.1:3000"
SITE = "https://app.example"
CORS = {"allow_origins": (SITE,), "allow_credentials": False, "allow_methods": ["*"], "allow_headers": ["*"]}


def identify_right(headers: Headers) -> Caller | None:
    """A server with the one key "right"."""
    return Caller("vllm-1") if headers.get("authorization") == "Bearer right" else None


async def answer_ok(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("ok")(scope, receive, send)


def client(app: ASGIApp, url: str = HERE) -> TestClient:
    return TestClient(app, base_url=url, raise_server_exceptions=False)


def check(kind: Callable[..., Check], **access: Any) -> TestClient:
    return client(kind(answer_ok, lambda: Access(started=True, **access)))


async def status(app: ASGIApp, headers: Sequence[tuple[bytes, bytes]], **scope: Any) -> int:
    """The status of an answer to a request with exactly these headers."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    head = {"type": "http", "http_version": "1.1", "method": "GET", "path": "/v1/models", "headers": headers}
    await app({**head, **scope}, receive, send)
    code: int = sent[0]["status"]
    return code


async def fail(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/late":
        await send({"type": "http.response.start", "status": 200, "headers": []})
    raise RuntimeError("secret")
