"""Request bodies: how large one may be, and how much of all of them is in memory at once.

A body is read here to its end and passed on whole, so that nothing behind waits for a slow sender. Only the body of
an upload is passed on piece by piece, since its file goes to the disk.
"""

from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.edge.clients import Shares, sender_name, wait_for_reader
from service.edge.media_types import is_upload
from service.errors import ApiError, error_response
from service.settings import Settings

UPLOAD_OVERHEAD = 2**20
"""Bytes of a multipart body that are not the archive: boundaries, headers and the other parts."""
TRANSFERS = 4
"""Uploads and exports in progress. Each upload takes up to `max_upload_bytes` of the temporary folder and as much of
the data folder; each export is in memory until its client has read it."""
LARGEST_BODIES = 64
"""How many bodies of the largest size fit in memory together."""
CLOSE = {"connection": "close"}


class _Body:
    """State of one request body."""

    __slots__ = ("client", "is_dropped", "parts", "size")

    def __init__(self, client: str) -> None:
        self.client = client
        self.parts: list[bytes] = []
        self.size = 0
        self.is_dropped = False


def _full(message: str) -> ApiError:
    return ApiError(429, message, headers=CLOSE)


class LimitBodies:
    """ASGI middleware that answers 413 to a body that is too large, if it can before the first byte is read.

    A body counts until its request has been answered. All together may have the size of `LARGEST_BODIES`, those of one
    client three quarters of it: what goes beyond its client's share is answered 429, and beyond the whole the body that
    has been incomplete for longest.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._limit = settings.max_body_bytes
        self._upload_limit = settings.max_upload_bytes
        self._budget = LARGEST_BODIES * settings.max_body_bytes
        self._transfers = Shares(TRANSFERS)
        self._size = 0
        self._client_sizes: Counter[str] = Counter()
        self._incomplete: dict[_Body, None] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its whole body, or answer 413, 415 or 429."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        uploads = is_upload(scope)
        error = _check_head(headers, self._upload_limit + UPLOAD_OVERHEAD if uploads else self._limit)
        if error is not None:
            await error_response(error)(scope, receive, send)
        elif uploads or is_export(scope):
            await self._pass_transfer(scope, receive, send, self._pass_upload if uploads else self._pass_whole)
        else:
            await self._pass_whole(scope, receive, send)

    async def _pass_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(sender_name(scope))
        self._incomplete[body] = None
        try:
            try:
                whole = await self._read(body, receive)
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
            if whole is not None:  # else the client has gone
                await self.app(scope, replay(whole, receive), send)
        finally:
            self._incomplete.pop(body, None)
            self._count(body, -body.size)

    async def _read(self, body: _Body, receive: Receive) -> Message | None:
        """The whole body as one message; None when the client disconnects before its end."""
        while True:
            message = await receive()
            if body.is_dropped:
                raise _full("Too many incomplete request bodies; this one has been incomplete the longest. Try again.")
            if message["type"] == "http.disconnect":
                return None
            if part := message.get("body", b""):
                self._hold(body, part)
            if not message.get("more_body"):
                del self._incomplete[body]
                whole, body.parts = b"".join(body.parts), []
                return {"type": "http.request", "body": whole, "more_body": False}

    def _hold(self, body: _Body, part: bytes) -> None:
        """Keep one more part of `body`; raise `ApiError` when it grows too large, or memory is full."""
        if body.size + len(part) > self._limit:
            raise _too_large(self._limit)
        if self._client_sizes[body.client] + len(part) > 3 * self._budget // 4:
            raise _full("This client's request bodies fill its share of the server's memory; try again.")
        while self._size + len(part) > self._budget:
            oldest = next(iter(self._incomplete))
            self._drop(oldest)
            if oldest is body:
                raise _full("The request bodies in progress fill the server's memory for them; try again.")
        body.parts.append(part)
        self._count(body, len(part))

    def _count(self, body: _Body, size: int) -> None:
        body.size += size
        self._size += size
        self._client_sizes[body.client] += size
        if not self._client_sizes[body.client]:
            del self._client_sizes[body.client]

    def _drop(self, body: _Body) -> None:
        del self._incomplete[body]
        self._count(body, -body.size)
        body.parts, body.is_dropped = [], True

    async def _pass_transfer(self, scope: Scope, receive: Receive, send: Send, app: ASGIApp) -> None:
        client = sender_name(scope)
        if not self._transfers.take(client):
            message = f"{TRANSFERS} uploads and exports are in progress, or most of them from this client; try again."
            await error_response(_full(message))(scope, receive, send)
            return
        try:
            await app(scope, receive, send)
            await wait_for_reader(scope)
        finally:
            self._transfers.free(client)

    async def _pass_upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        size, limit = 0, self._upload_limit + UPLOAD_OVERHEAD

        async def receive_bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise _too_large(limit)  # the route answers it
            return message

        await self.app(scope, receive_bounded, send)


def is_export(scope: Scope) -> bool:
    """Whether a request exports a fusion."""
    path: str = scope["path"]
    return path.startswith("/v1/fusions/") and path.endswith("/export")


def _check_head(headers: dict[bytes, bytes], limit: int) -> ApiError | None:
    """What is wrong with a body by the headers alone; None: nothing."""
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > limit:
        return _too_large(limit)
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding not in (b"", b"identity"):
        return ApiError(415, "Compressed bodies are not read; send it without Content-Encoding.", headers=CLOSE)
    return None


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request body is larger than {limit} bytes.", headers=CLOSE)


def replay(whole: Message, receive: Receive) -> Receive:
    """A `receive` that gives the whole body once, and then what the connection does (its end)."""
    messages = [whole]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
