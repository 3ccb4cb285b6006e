"""The last resort: what nothing further in has answered still gets an answer in the shape of all errors."""

import logging
from contextlib import suppress

from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ApiError, error_response

log = logging.getLogger("fusion")


class Faults:
    """Answers 500 when the app fails before its answer has begun, and 404 to websockets, which no route takes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and answer for an app that fails."""
        if scope["type"] == "websocket":
            if "websocket.http.response" in scope.get("extensions", {}):
                await error_response(ApiError(404, "No route here takes a websocket."))(scope, receive, send)
            else:
                await send({"type": "websocket.close"})
            return
        try:
            await self.app(scope, receive, send)
        except Exception:
            if scope["type"] != "http":
                raise
            log.exception("a request failed")
            # Where an answer has begun, the HTTP server takes no second one; it ends the connection if it has no end.
            with suppress(RuntimeError):
                await error_response(ApiError(500, "Internal server error; see the server log."))(scope, receive, send)
