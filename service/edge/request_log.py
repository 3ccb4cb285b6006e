"""One line of the log for each request: who asked, for what, how it ended, how long it took."""

import logging
import secrets
import time
from typing import Any

from opentelemetry import trace
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.callers import CALLER, find_caller, hide_secrets
from service.edge.check import header_values
from service.edge.request_ids import ID

log = logging.getLogger("fusion.access")

ENTRY = "fusion.log"
"""Key of a request's scope: what its line says besides, filled in by whoever knows it."""
FIELDS = "fusion_fields"
MAX_PATH = 200
QUIET = ("/livez", "/readyz", "/healthz", "/health", "/ping", "/metrics")
"""Paths that are asked again and again; logged when they are not answered 200."""


class RequestLog:
    """Logs each request when its answer has ended; one without an `X-Request-Id` gets one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and log it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = [value.decode("latin-1") for value in header_values(scope, b"x-request-id")]
        id_ = given[0] if given and ID.fullmatch(given[0]) else secrets.token_hex(8)
        entry: dict[str, Any] = {}
        scope[ENTRY] = entry
        if not given:
            scope["headers"] = [*scope["headers"], (b"x-request-id", id_.encode())]
        began, status = time.monotonic(), 0

        async def send_seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_seen)
        finally:
            if status != 200 or scope["path"] not in QUIET:
                context = trace.get_current_span().get_span_context()
                caller = find_caller(scope)
                fields = {
                    "request_id": id_,
                    "trace_id": f"{context.trace_id:032x}" if context.is_valid else "",
                    "key": caller.key,
                    "tenant": caller.tenant,
                    "role": caller.role if CALLER in scope else "",
                    "method": scope["method"],
                    "path": hide_secrets(scope["path"])[:MAX_PATH],
                    "status": status,
                    "duration_s": round(time.monotonic() - began, 6),
                    **entry,
                }
                log.info("request", extra={FIELDS: fields})
