"""The gate before vLLM's routes: finds the fusion a request names, leases it, and answers in its name.

Pure ASGI, so that streams pass through chunk by chunk. A request for the plain base is read once and handed
on byte for byte.
"""

import json
import time
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.defaults import with_defaults
from service.engine.models import LoRARequest, Served, meter, mix_request, served
from service.errors import ApiError, error_response
from service.metrics import Metrics
from service.pool import Lease, Pool
from service.resolve import Fusion, Names

MAX_RECIPE_HEADER = 2048


def fusion_headers(fusion: Fusion, lease: Lease) -> list[tuple[bytes, bytes]]:
    """The `x-fusion-*` headers of an answer."""
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


def lora_of(lease: Lease) -> LoRARequest:
    """What vLLM gets: the resident itself, or the stack under a name that holds this request's weights."""
    return mix_request(lease.resident.request, lease.resident.key, lease.spans)


class Gate:
    """ASGI middleware in front of vLLM's app."""

    def __init__(self, app: ASGIApp, names: Names, pool: Pool, metrics: Metrics, *, strict: bool) -> None:
        self._app = app
        self._names = names
        self._pool = pool
        self._metrics = metrics
        self._strict = strict

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on what names no model; resolve the rest."""
        # uvicorn starts a pipelined request in the context of the one before it.
        served.set(None)
        meter.set(None)
        if scope["type"] != "http" or scope["method"] != "POST" or not _is_json(scope):
            await self._app(scope, receive, send)
            return
        raw = await _read(receive)
        if raw is None:
            return  # the client went away before its request was whole
        try:
            body = _parse(raw)
            named = isinstance(body, dict) and bool({"model", "fusion"} & body.keys())
            fusion = self._find(body) if named else None
        except Exception as error:
            refusal = error_response(error)
            self._metrics.requests.labels("(refused)", str(refusal.status_code)).inc()
            await refusal(scope, receive, send)
            return
        if named:
            await self._answer(scope, receive, send, raw, body, fusion)
        else:
            await self._app(scope, _replay(raw, receive), send)

    def _find(self, body: dict[str, Any]) -> Fusion | None:
        model, value = body.get("model"), body.get("fusion")
        if value is None:
            return None if model is None else self._names.look_up(model)
        if model not in (None, self._names.base):
            raise ApiError(
                400,
                f"'fusion' goes with the base model {self._names.base!r} only, not with {model!r}: "
                "name the mix in one place.",
                param="fusion",
            )
        return self._names.resolve_field(value)

    async def _answer(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        raw: bytes,
        body: dict[str, Any],
        fusion: Fusion | None,
    ) -> None:
        label = "(base)" if fusion is None else fusion.label
        watch = _Watch(send, self._metrics, label)
        meter.set(watch)  # for this request's task alone: each has a context of its own
        if fusion is None:
            if body.keys() & {"fusion", "strict"}:
                raw = _without(body)
            await self._app(scope, _replay(raw, receive), watch)
            return
        strict = body.get("strict", self._strict)
        if not isinstance(strict, bool):
            bad = ApiError(400, "'strict' must be true or false.", param="strict")
            await error_response(bad)(scope, receive, watch)
            return
        if body.get("background"):
            # vLLM would go on after the answer, when the adapters under it may be unloaded.
            bad = ApiError(400, "'background' goes with the base model only.", param="background")
            await error_response(bad)(scope, receive, watch)
            return
        try:
            lease = await self._pool.acquire(fusion, strict=strict)
        except Exception as error:
            await error_response(error)(scope, receive, watch)
            return
        try:
            self._metrics.leases.labels(lease.resident.kind).inc()
            if body.get("model") is None:
                body["model"] = self._names.base
            if fusion.defaults:
                body = with_defaults(body, fusion.defaults, scope["path"])
            if fusion.defaults or body.keys() & {"fusion", "strict"}:
                raw = _without(body)
            watch.headers = fusion_headers(fusion, lease)
            token = served.set(Served(body["model"], lora_of(lease), fusion.defaults.get("chat_template")))
            try:
                await self._app(scope, _replay(raw, receive), watch)
            finally:
                served.reset(token)
        finally:
            self._metrics.leases.labels(lease.resident.kind).dec()
            await self._pool.release(lease)


class _Watch:
    """`send` with the fusion's headers added; counts the answer's status, tokens and first token."""

    def __init__(self, send: Send, metrics: Metrics, label: str) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self._send = send
        self._metrics = metrics
        self._label = label
        self._began = time.monotonic()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *self.headers]
            self._metrics.requests.labels(self._label, str(message["status"])).inc()
        await self._send(message)

    def generated(self, prompt: int, completion: int, first_token: float | None) -> None:
        """A generation for this request has ended, or was broken off."""
        self._metrics.tokens.labels(self._label, "prompt").inc(prompt)
        self._metrics.tokens.labels(self._label, "completion").inc(completion)
        if first_token is not None:
            self._metrics.first_token.labels(self._label).observe(first_token - self._began)


def _is_json(scope: Scope) -> bool:
    for key, value in scope["headers"]:
        if key == b"content-type":
            return b"json" in value.lower()
    return True


async def _read(receive: Receive) -> bytes | None:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw) if raw else {}
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The request body is not JSON: {error}.") from error


def _without(body: dict[str, Any]) -> bytes:
    return json.dumps({k: v for k, v in body.items() if k not in ("fusion", "strict")}).encode()


def _replay(raw: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `raw` once, then what the connection says (its end)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": raw, "more_body": False}
        return await receive()

    return again
