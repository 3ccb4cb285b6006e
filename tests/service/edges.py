"""A small app behind the edge's middleware under uvicorn, and raw connections to it."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

from service.edge.bodies import LimitBodies
from service.edge.clients import LimitRequests
from service.edge.connections import ConnectionLimits, Connections
from service.edge.protocol import BoundedProtocol
from service.settings import Settings

LIMITS = ConnectionLimits(connections=16, client_timeout_s=1, request_timeout_s=4, drain_bytes=100_000)
SETTINGS = Settings(max_body_bytes=100_000, max_upload_bytes=300_000)
STALL_S = 4.0
PROMPT_S = 10.0
"""Within which anything must have ended: several times the limits."""
CHUNK, LARGE = bytes(2**16), bytes(2**24)


class App:
    """`/` answers at once, `/echo` the body's length, `/large` one large part, `/flood` for ever, `/silent` never.

    `/stall` holds the event loop.
    """

    def __init__(self) -> None:
        self.running = 0
        self.seen: list[str] = []
        self.headers: list[tuple[bytes, bytes]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.running += 1
        self.seen.append(scope["path"])
        try:
            await self._answer(scope, receive, send)
        finally:
            self.running -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        size, path = 0, scope["path"]
        if path == "/stall":
            time.sleep(STALL_S)
        if path == "/silent":
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        while path == "/echo":
            message = await receive()
            size += len(message.get("body", b""))
            if not message.get("more_body"):
                break
        self.headers = scope["headers"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if path == "/flood":
            flood = asyncio.create_task(self._flood(send))
            while (await receive())["type"] != "http.disconnect":
                pass
            flood.cancel()
            return
        await send({"type": "http.response.body", "body": LARGE if path == "/large" else str(size).encode()})

    async def _flood(self, send: Send) -> None:
        while True:
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
            await asyncio.sleep(0)


class Edge:
    """A running uvicorn: raw sockets to it."""

    def __init__(self, port: int, app: App) -> None:
        self.port, self.app = port, app

    def connect(self, *parts: bytes) -> socket.socket:
        peer = socket.create_connection(("127.0.0.1", self.port), timeout=PROMPT_S)
        for part in parts:
            peer.sendall(part)
        return peer

    def ask(self, *parts: bytes) -> tuple[int, bytes]:
        with self.connect(*parts) as peer:
            return read_answer(peer)

    def wait_idle(self) -> None:
        deadline = time.monotonic() + PROMPT_S
        while self.app.running:
            assert time.monotonic() < deadline, f"{self.app.running} requests are still running"
            time.sleep(0.05)


def read_answer(peer: socket.socket) -> tuple[int, bytes]:
    """Status (0: none) and everything until the server closes."""
    data = bytearray()
    with contextlib.suppress(ConnectionError):
        while part := peer.recv(2**16):
            data += part
    return int(data[:20].split()[1]) if data else 0, bytes(data)


GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


def post(length: int | None, path: str = "/echo", *headers: str) -> bytes:
    framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    return "\r\n".join([f"POST {path} HTTP/1.1", "host: x", framing, *headers, "", ""]).encode()


@contextlib.contextmanager
def run_edge() -> Iterator[Edge]:
    app = App()
    stack = LimitBodies(LimitRequests(app, exempt=("/livez",), max_requests=8), SETTINGS)
    protocol: Any = partial(BoundedProtocol, Connections(lambda: LIMITS))
    server = uvicorn.Server(uvicorn.Config(stack, http=protocol, log_config=None, lifespan="off"))
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield Edge(listener.getsockname()[1], app)
    server.should_exit = server.force_exit = True
    thread.join(PROMPT_S)
    assert not thread.is_alive()
