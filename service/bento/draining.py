"""The time between SIGTERM and the end of accepting: health checks say no, requests are still answered.

Routers notice at their next check and send nothing more; only then does the server begin to stop.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.bento.patches import require


def install(begin: Callable[[], bool], drain_s: float) -> None:
    """Have uvicorn, on a signal to stop, call `begin`; on SIGTERM, if that is true, it stops `drain_s` seconds later.

    SIGINT, a person's, stops at once.
    """
    stop: Callable[[uvicorn.Server, int, FrameType | None], None] = require(
        uvicorn.Server, "handle_exit", "self", "sig", "frame"
    )
    timers: list[threading.Timer] = []

    def handle_exit(self: uvicorn.Server, sig: int, frame: FrameType | None) -> None:
        answers = begin()
        if sig != signal.SIGTERM or self.should_exit or not (answers and drain_s):
            stop(self, sig, frame)
        elif not timers:  # a process manager may signal the whole group, and the supervisor this worker again
            timers.append(threading.Timer(drain_s, stop, (self, sig, frame)))
            timers[0].daemon = True
            timers[0].start()

    uvicorn.Server.handle_exit = handle_exit  # type: ignore[method-assign]  # what its signals call


class CloseConnections:
    """ASGI middleware that ends each connection with its answer while the server drains: the client's next request
    comes by another one, which a router sends elsewhere.
    """

    def __init__(self, app: ASGIApp, is_draining: Callable[[], bool]) -> None:
        self.app = app
        self._is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""

        async def send_close(message: Message) -> None:
            if message["type"] == "http.response.start" and self._is_draining():
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        await self.app(scope, receive, send_close if scope["type"] == "http" else send)
