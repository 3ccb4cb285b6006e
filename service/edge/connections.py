"""Open connections of a server: how many there may be, and the one timer that looks after all of them."""

import asyncio
import logging
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from service.errors import ApiError
from service.settings import Settings

log = logging.getLogger("fusion")

SWEEP_S = 1.0
SEND_BUFFER = 256 * 2**10
"""Bytes that the kernel keeps for a client that does not read; it may take twice as much."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Open connections, seconds for a client's part, seconds for an answer, body bytes read after an answer."""

    connections: int
    client_timeout_s: float
    request_timeout_s: float
    drain_bytes: int


def derive_limits(settings: Settings) -> ConnectionLimits:
    """Four connections for each request in progress, but at most half of the files that this process may open."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = min(4 * settings.max_requests, files // 2)
    return ConnectionLimits(connections, settings.client_timeout_s, settings.request_timeout_s, settings.max_body_bytes)


class Connection(Protocol):
    """What `Connections` needs of one; `network` is its client."""

    network: str
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport

    def refuse(self, error: ApiError) -> None:
        """Answer `error` and close."""

    def check(self, now: float) -> None:
        """End what has taken too long."""


class Connections:
    """All open connections of one server."""

    def __init__(self, read_limits: Callable[[], ConnectionLimits]) -> None:
        self._read_limits = read_limits
        self._open: set[Connection] = set()
        self._waiting: dict[str, dict[Connection, None]] = {}
        """By client: connections without a whole request, the one that waits for longest first."""
        self._timer: asyncio.TimerHandle | None = None
        self._swept_at = 0.0
        self._stalled_s = 0.0

    @cached_property
    def limits(self) -> ConnectionLimits:
        """Read when the first connection is made."""
        return self._read_limits()

    def read_clock(self, loop: asyncio.AbstractEventLoop) -> float:
        """Seconds, without those in which the event loop stood still: no client could be heard in them."""
        return loop.time() - self._stalled_s

    def add(self, connection: Connection) -> None:
        """Count a new connection; when there are too many, close one of the client with the most that wait."""
        self._open.add(connection)
        if len(self._open) > self.limits.connections:
            crowd = max(self._waiting.values(), key=len, default=None)
            if crowd is None:
                message = "The server has too many open connections; try again."
                connection.refuse(ApiError(503, message))
                return
            oldest = next(iter(crowd))
            self.start_work(oldest)
            oldest.transport.close()
        self.start_wait(connection)
        if self._timer is None:
            self._swept_at = connection.loop.time()
            self._timer = connection.loop.call_later(SWEEP_S, self._sweep, connection.loop)

    def start_wait(self, connection: Connection) -> None:
        """From now on the connection may be closed when others need its place."""
        self._waiting.setdefault(connection.network, {})[connection] = None

    def start_work(self, connection: Connection) -> None:
        """From now on the connection has a whole request to be answered."""
        if (group := self._waiting.get(connection.network)) is not None:
            group.pop(connection, None)
            if not group:
                del self._waiting[connection.network]

    def remove(self, connection: Connection) -> None:
        """Forget a connection that has ended."""
        self.start_work(connection)
        self._open.discard(connection)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(SWEEP_S, self._sweep, loop) if self._open else None
        before, self._swept_at = self._swept_at, loop.time()
        self._stalled_s += max(self._swept_at - before - 2 * SWEEP_S, 0)
        now = self.read_clock(loop)
        for connection in list(self._open):
            try:
                connection.check(now)
            except Exception:  # must not keep the other connections from their check
                log.exception("a connection could not be checked")
                connection.transport.abort()


def bound_socket(transport: asyncio.Transport, timeout_s: float) -> None:
    """Bound what the kernel keeps for the peer, and end the connection of one that takes nothing for `timeout_s`."""
    peer = transport.get_extra_info("socket")
    if peer is None or peer.family not in (socket.AF_INET, socket.AF_INET6):
        return
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    seconds = max(1, round(timeout_s))
    for option, value in (
        ("TCP_KEEPIDLE", seconds),
        ("TCP_KEEPINTVL", max(1, seconds // 3)),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 1000 * seconds),
    ):
        if hasattr(socket, option):  # not everywhere
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
