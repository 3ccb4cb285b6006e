"""uvicorn's HTTP protocol with limits: how long a client may take over each part of a request.

uvicorn has no time limit for a head, a body or a client that does not read. `Connections` calls `check` once a second,
so that the parts of an answer cost nothing.
"""

import asyncio
import http
from collections.abc import Callable
from itertools import chain
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.edge.bodies import is_export
from service.edge.clients import DRAIN, client_network
from service.edge.connections import Connections, bound_socket
from service.edge.media_types import is_upload
from service.edge.upgrades import UpgradeBlindParser
from service.errors import ApiError, error_response

KEEP_ALIVE_S = 75
"""How long an idle connection stays open: longer than clients are told to wait before they ask again, and than clients
and load balancers keep theirs (5 to 60 s), so that nobody sends a request into a connection that is just being closed.
"""
LINGER_S = 2.0
"""How long what a client still sends is read after an answer that closes the connection.

Closing at once would reset the connection, and the client might lose the answer.
"""
MAX_HEAD_BYTES = 64 * 2**10
"""Bytes in a row that belong to no body: a head, trailers, the framing of chunks."""
MAX_PIPELINED = 16
"""Requests that a connection may send ahead of the answers."""
MAX_HEADERS = 256
MIN_RATE = 1024
"""Bytes per second that a client must send of a body, and read of an answer, on average over each client timeout."""
MIN_TRANSFER_RATE = 64 * 2**10
"""The same for uploads and exports, of which few can be in progress."""


class _AnswerTransport:
    """The transport as uvicorn's answers use it; `close` first lets the request's body come to its end."""

    __slots__ = ("_write", "close", "is_closing", "written")

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self._write = transport.write
        self.is_closing = transport.is_closing
        self.close = close
        self.written = 0

    def write(self, data: bytes) -> None:
        """Count and write."""
        self.written += len(data)
        self._write(data)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits; the methods extend those of the same name."""

    def __init__(self, table: Connections, **options: Any) -> None:
        super().__init__(**options)
        self.ws_protocol_class = None  # no route is a websocket
        self.timeout_keep_alive = KEEP_ALIVE_S
        self.parser: Any = UpgradeBlindParser(self)
        self.table = table
        self.network = ""
        self.running: RequestResponseCycle | None = None
        """The request being answered; `cycle` is the one being read."""
        self.running_since = 0.0
        self.head_since: float | None = None
        self.is_body_open = False
        self.body_bytes = 0
        self.drained_bytes = 0
        """Of the body, after the answer."""
        self.window = (0.0, 0)
        """When the time for the next part of the body began, and how much had come until then."""
        self.quiet_bytes = 0
        """Bytes since the last part of a body."""
        self.is_paused = False
        self.has_unread = False
        """Whether uvicorn waited for the client to read at the last check."""
        self.read_window = (0.0, 0)
        """When the time to read the next part of the answer began, and how much had been read until then."""
        self.drain_until: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Count the connection; its head must come from now on."""
        super().connection_made(transport)
        self.network = client_network(self.client[0]) if self.client else ""
        self.head_since = self.table.read_clock(self.loop)
        self.read_window = (self.head_since, 0)
        bound_socket(transport, self.table.limits.client_timeout_s)
        self.answer_transport: Any = _AnswerTransport(transport, self.end_answer)
        self.table.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the requests that wait for the client."""
        self.parser.close()
        super().connection_lost(exc)
        if self.running is not None:  # uvicorn tells `cycle` alone, which may be a pipelined one
            self._disconnect(self.running)
        self.table.remove(self)

    def data_received(self, data: bytes) -> None:
        """Refuse what goes on and on without being a body."""
        if self.timeout_keep_alive_task is not None:
            self.head_since = self.table.read_clock(self.loop)
        self.quiet_bytes += len(data)
        super().data_received(data)
        if self.quiet_bytes > MAX_HEAD_BYTES:
            self.refuse(ApiError(431, f"The request's headers are larger than {MAX_HEAD_BYTES} bytes."))

    def on_message_begin(self) -> None:
        """The head must be complete in time."""
        super().on_message_begin()
        scope: Any = self.scope  # uvicorn's type knows no other keys
        scope[DRAIN] = self.flow.drain
        self.head_since = self.table.read_clock(self.loop)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Drop what comes after the body: it has been checked by nobody."""
        if not self.is_body_open:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the request, or put it behind the one that is being answered."""
        if self.transport.is_closing() or len(self.pipeline) >= MAX_PIPELINED:
            self.transport.abort()
            raise ValueError(f"more than {MAX_PIPELINED} requests ahead of the answers")  # ends the parsing
        if len(self.headers) > MAX_HEADERS or sum(map(len, chain(*self.headers)), len(self.url)) > MAX_HEAD_BYTES:
            if self.running is None:
                self.refuse(ApiError(431, f"The request's headers are over {MAX_HEADERS} or {MAX_HEAD_BYTES} bytes."))
            else:
                self.transport.abort()
            raise ValueError("the head is too large")  # ends the parsing
        super().on_headers_complete()
        self.cycle.transport = self.answer_transport
        self.head_since, self.is_body_open, self.body_bytes = None, True, 0
        self.window = (self.table.read_clock(self.loop), 0)
        if self.running is None:
            self.running, self.running_since = self.cycle, self.window[0]

    def on_body(self, body: bytes) -> None:
        """Count, and end what is sent after the answer without end."""
        self.quiet_bytes = 0
        self.body_bytes += len(body)
        if self.cycle.response_complete:
            self.drained_bytes += len(body)
            if self.drained_bytes > self.table.limits.drain_bytes:
                self.transport.abort()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        super().on_message_complete()
        self.quiet_bytes, self.is_body_open = 0, False
        if self.drain_until is not None:
            self.transport.close()
        elif self.running is self.cycle:
            self.table.start_work(self)

    def on_response_complete(self) -> None:
        """Wait for the next request, or go on with one that has come."""
        following = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()
        self.running, self.running_since, self.drained_bytes = following, self.table.read_clock(self.loop), 0
        self.window = (self.running_since, self.body_bytes)
        if following is None or following.more_body:
            self.table.start_wait(self)

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self.is_paused = True

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self.is_paused = False

    def send_400_response(self, msg: str) -> None:
        """As `refuse`, in the shape of all errors."""
        self.refuse(ApiError(400, msg))

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: anyone could fill the log."""

    def end_answer(self) -> None:
        """Close the connection, but let what the client is still sending come for `LINGER_S`."""
        if self.running is self.cycle and self.is_body_open and not self.transport.is_closing():
            self.drain_until = self.table.read_clock(self.loop) + LINGER_S
            self.flow.resume_reading()
            if self.transport.can_write_eof():
                self.transport.write_eof()
        else:
            self.transport.close()

    def refuse(self, error: ApiError) -> None:
        """Answer `error` unless another answer has begun, tell the app that the client has gone, and close."""
        if self.transport.is_closing() or self.drain_until is not None:
            return
        running = self.running
        if running is not None and (running.response_started or running is not self.cycle):
            self.transport.abort()
            return
        self.transport.write(_format_answer(error, self.server_state.default_headers))
        if running is not None:
            self._disconnect(running)
        self.transport.close()

    def _disconnect(self, cycle: RequestResponseCycle) -> None:
        cycle.disconnected = cycle.disconnected or not cycle.response_complete
        cycle.message_event.set()

    def check(self, now: float) -> None:
        """End what has taken too long at `now`, by the table's clock."""
        limits = self.table.limits
        is_late = now - self.running_since > limits.request_timeout_s
        if self._is_stuck(now) or (is_late and self.has_unread and self.running is None):
            self.transport.abort()
        elif self.transport.is_closing():
            pass
        elif self.drain_until is not None:
            if now > self.drain_until:
                self.transport.abort()
        elif self.running is not None:
            if is_late:
                message = f"The answer took longer than {limits.request_timeout_s:g} s (FUSION_REQUEST_TIMEOUT_S)."
                self.refuse(ApiError(504, message))
            elif self.running is self.cycle and self._is_body_slow(now):
                self._refuse_slow("body")
        elif self.is_body_open:
            if self._is_body_slow(now):
                self.transport.close()  # it has been answered
        elif self.head_since is not None and now - self.head_since > limits.client_timeout_s:
            if self.quiet_bytes:
                self._refuse_slow("head")
            else:
                self.transport.close()  # nothing has come

    def _is_stuck(self, now: float) -> bool:
        """Whether the last client timeout read less than the least rate, of an answer that waits for the client."""
        since, before = self.read_window
        timeout = self.table.limits.client_timeout_s
        unread = self.transport.get_write_buffer_size()
        self.has_unread = bool(unread) and (self.is_paused or self.transport.is_closing())
        done = self.answer_transport.written - unread
        if self.has_unread and now - since <= timeout:
            return False
        self.read_window = (now, done)
        return self.has_unread and done - before < timeout * _least_rate(self.running)

    def _is_body_slow(self, now: float) -> bool:
        """Whether the last client timeout brought less than the least rate, unless the app lets the client wait."""
        since, before = self.window
        timeout = self.table.limits.client_timeout_s
        is_waiting = self.flow.read_paused or self.cycle.waiting_for_100_continue
        if not self.is_body_open or is_waiting or now - since > timeout:
            self.window = (now, self.body_bytes)
        return (
            self.is_body_open
            and not is_waiting
            and now - since > timeout
            and self.body_bytes - before < timeout * _least_rate(self.cycle)
        )

    def _refuse_slow(self, part: str) -> None:
        timeout = self.table.limits.client_timeout_s
        self.refuse(ApiError(408, f"The request's {part} did not come within {timeout:g} s (FUSION_CLIENT_TIMEOUT_S)."))


def _least_rate(cycle: RequestResponseCycle | None) -> int:
    scope: Any = cycle and cycle.scope
    return MIN_TRANSFER_RATE if scope and (is_upload(scope) or is_export(scope)) else MIN_RATE


def _format_answer(error: ApiError, default_headers: list[tuple[bytes, bytes]]) -> bytes:
    response = error_response(error)
    headers = [*default_headers, *response.raw_headers, (b"connection", b"close")]
    lines = [b"HTTP/1.1 %d %s" % (response.status_code, http.HTTPStatus(response.status_code).phrase.encode())]
    return b"\r\n".join([*lines, *(b"%s: %s" % pair for pair in headers), b"", bytes(response.body)])
