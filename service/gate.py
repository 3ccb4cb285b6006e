"""The gate to vLLM's routes: resolves the fusion that a request names, and leases it for as long as vLLM answers.

Pure ASGI, so that streams pass through chunk by chunk. A request for the plain base is read once and passed
on byte for byte.
"""

import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.defaults import with_defaults
from service.engine.models import ServedModel, meter, mix_request, served_model
from service.errors import ApiError, error_response
from service.metrics import Metrics
from service.pool import Lease, Pool
from service.resolve import Fusion, Names

MAX_RECIPE_HEADER = 2048
"""Bytes; a longer recipe is left out of the headers."""
FUSION_KEYS = {"fusion", "strict"}
"""Request keys that vLLM does not know."""


def fusion_headers(fusion: Fusion, lease: Lease) -> list[tuple[bytes, bytes]]:
    """The `x-fusion-*` headers of an answer, the recipe percent-encoded."""
    recipe = quote(fusion.recipe.format(), safe="*+(),=@ ")
    pairs = {
        "x-fusion-digest": fusion.digest,
        "x-fusion-mode": lease.mode,
        "x-fusion-source": lease.source,
        "x-fusion-rank": str(lease.rank),
        "x-fusion-error": f"{lease.resident.error:.3g}",
    }
    if len(recipe) <= MAX_RECIPE_HEADER:
        pairs["x-fusion-recipe"] = recipe
    return [(key.encode(), value.encode()) for key, value in pairs.items()]


class Gate:
    """ASGI app in front of vLLM's."""

    def __init__(self, app: ASGIApp, names: Names, pool: Pool, metrics: Metrics, *, strict: bool) -> None:
        self._app = app
        self._names = names
        self._pool = pool
        self._metrics = metrics
        self._strict = strict

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what names no model; resolve and lease the rest, or answer with the error."""
        # uvicorn starts a pipelined request in the context of the one before it.
        served_model.set(None)
        meter.set(None)
        if scope["type"] != "http" or scope["method"] != "POST" or not _is_json(scope):
            await self._app(scope, receive, send)
            return
        raw = await _read_body(receive)
        if raw is None:
            return  # the client went away before its request was whole
        metered = _MeteredSend(send, self._metrics)
        async with AsyncExitStack() as leases:
            try:
                raw = await self._prepare(scope["path"], raw, metered, leases)
            except Exception as error:
                await error_response(error)(scope, receive, metered)
                return
            await self._app(scope, _replay(raw, receive), metered)

    async def _prepare(self, path: str, raw: bytes, metered: "_MeteredSend", leases: AsyncExitStack) -> bytes:
        """Lease what the body's fusion needs, set this request's context and headers, and return the body for vLLM."""
        body = _parse_body(raw)
        if not isinstance(body, dict) or not {"model", "fusion"} & body.keys():
            metered.label = None
            return raw
        fusion = self._resolve(body)
        metered.label = "(base)" if fusion is None else fusion.label
        meter.set(metered)  # for this request's task alone: each has a context of its own
        if fusion is None:
            return strip_fusion_keys(body) if body.keys() & FUSION_KEYS else raw
        strict = body.get("strict", self._strict)
        if not isinstance(strict, bool):
            raise ApiError(400, f"'strict' must be true or false, got {json.dumps(strict)[:100]}.", param="strict")
        if body.get("background"):
            # vLLM would go on after the answer, when the adapters under it may be unloaded.
            raise ApiError(400, "'background' works with the base model only.", param="background")
        lease = await leases.enter_async_context(self._lease(fusion, strict=strict))
        changed = bool(fusion.defaults or body.keys() & FUSION_KEYS)
        if body.get("model") is None:
            body["model"] = self._names.base
        body = with_defaults(body, fusion.defaults, path)
        metered.headers = fusion_headers(fusion, lease)
        lora = mix_request(lease.resident.request, lease.resident.key, lease.spans)
        token = served_model.set(ServedModel(body["model"], lora, fusion.defaults.get("chat_template")))
        leases.callback(served_model.reset, token)
        return strip_fusion_keys(body) if changed else raw

    def _resolve(self, body: dict[str, Any]) -> Fusion | None:
        """The fusion that a body names; None for the base."""
        model, value = body.get("model"), body.get("fusion")
        if value is None:
            return None if model is None else self._names.look_up(model)
        if model not in (None, self._names.base):
            raise ApiError(
                400,
                f"'fusion' works with the base model {self._names.base!r} only, not with {model!r}: "
                "name the fusion in one place.",
                param="fusion",
            )
        return self._names.resolve_field(value)

    @asynccontextmanager
    async def _lease(self, fusion: Fusion, *, strict: bool) -> AsyncIterator[Lease]:
        lease = await self._pool.acquire(fusion, strict=strict)
        gauge = self._metrics.leases.labels(lease.resident.kind)
        gauge.inc()
        try:
            yield lease
        finally:
            gauge.dec()
            await self._pool.release(lease)


class _MeteredSend:
    """`send` that adds the fusion's headers and counts the answer's status, tokens and time to the first token."""

    def __init__(self, send: Send, metrics: Metrics) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.label: str | None = "(refused)"
        """What the answer is counted under; None is not counted."""
        self._send = send
        self._metrics = metrics
        self._start = time.monotonic()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *self.headers]
            if self.label is not None:
                self._metrics.requests.labels(self.label, str(message["status"])).inc()
        await self._send(message)

    def record_usage(self, prompt: int, completion: int, first_token: float | None) -> None:
        """Count a generation of this request that has ended, or was interrupted."""
        self._metrics.tokens.labels(self.label, "prompt").inc(prompt)
        self._metrics.tokens.labels(self.label, "completion").inc(completion)
        if first_token is not None:
            self._metrics.first_token.labels(self.label).observe(first_token - self._start)


def strip_fusion_keys(body: dict[str, Any]) -> bytes:
    """`body` as JSON without the keys that vLLM does not know."""
    return json.dumps({key: value for key, value in body.items() if key not in FUSION_KEYS}).encode()


def _is_json(scope: Scope) -> bool:
    """Whether the body may be JSON: its content type says so, or there is none."""
    for key, value in scope["headers"]:
        if key == b"content-type":
            return b"json" in value.lower()
    return True


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body; None when the client disconnected before its end."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _parse_body(raw: bytes) -> Any:
    try:
        return json.loads(raw) if raw else {}
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The request body is not valid JSON: {error}.") from error


def _replay(raw: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `raw` once, and then what the connection does (its end)."""
    bodies = [raw]

    async def replay() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        return await receive()

    return replay
