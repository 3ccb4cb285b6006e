"""Which stack a request belongs to, and who answers it when a replica is lost. Knows nothing of Ray."""

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from urllib.parse import quote

from service.errors import ApiError, error_body

STACK = b"x-fusion-stack"
CHANGES = ("/v1/adapters", "/v1/fusions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Where a request other than a GET changes the registry: it is not made twice. A plan does not."""
PLAN = "/v1/fusions/plan"
MAX_STACKS = 4096
"""Models whose stacks are remembered."""
LOOKUP_S = 2.0
"""A request goes to any replica when its stack is not known by then."""
HELD_BYTES = 4 * 2**20
"""An answer that is not an event stream is held to its end, up to this size; until then another replica can give it."""
PAUSES_S = (0.0, 0.2, 1.0, 3.0)
"""Before each further try."""

Headers = list[tuple[bytes, bytes]]
"""Names in lower case."""


class ReplicaLostError(Exception):
    """A replica ended, or is about to, before it had answered in full."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request as it came: method, path with query, headers, body."""

    method: str
    target: str
    headers: Headers
    body: bytes = b""

    @property
    def path(self) -> str:
        """Without the query."""
        return self.target.partition("?")[0]

    @property
    def may_repeat(self) -> bool:
        """Whether it may be made twice."""
        return self.method in ("GET", "HEAD") or self.path == PLAN or not self.path.startswith(CHANGES)

    def find_model(self) -> str:
        """The fusion that its JSON body names, as one text; empty where it names none."""
        if self.method != "POST" or b'"' not in self.body:
            return ""
        try:
            body = json.loads(self.body)
        except ValueError:  # the replica says what is wrong with it
            return ""
        if not isinstance(body, dict):
            return ""
        named = body.get("fusion") or body.get("model")
        return named if isinstance(named, str) else json.dumps(named, sort_keys=True) if named else ""


@dataclass(frozen=True, slots=True)
class Head:
    """Status and headers of an answer."""

    status: int
    headers: Headers

    def get(self, name: bytes) -> str:
        """The header's value, empty where there is none."""
        return next((value.decode("latin-1") for key, value in self.headers if key == name), "")


Send = Callable[[Call, str], AsyncGenerator[Head | bytes, None]]
"""Sends a call to a replica that has the stack of that key (empty: to any): yields the head, then the body in parts.

Raises `ReplicaLostError`.
"""


class Stacks:
    """The stack of each model: as the last answer said, or else as a replica says when it is asked."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._keys: OrderedDict[bytes, str] = OrderedDict()
        """By the digest of the model's text: a recipe may be long."""

    async def find(self, call: Call) -> str:
        """Key of the stack that serves `call`, empty where there is none or no replica says it in time."""
        model = call.find_model()
        if (name := _digest(model)) in self._keys:
            self._keys.move_to_end(name)
            return self._keys[name]
        if not model or model.startswith("{"):  # a recipe as an object has no address; its first answer tells
            return ""
        try:
            async with asyncio.timeout(LOOKUP_S):
                return await self._ask(model, call)
        except (TimeoutError, ReplicaLostError, ValueError):
            return ""

    async def _ask(self, model: str, call: Call) -> str:
        kept = [pair for pair in call.headers if pair[0] in (b"authorization", b"x-api-key", b"host")]
        status, body = 0, b""
        async with aclosing(self._send(Call("GET", f"/v1/models/{quote(model, safe='')}", kept), "")) as parts:
            async for part in parts:
                if isinstance(part, Head):
                    status = part.status
                else:
                    body += part
        if status != 200:  # the request itself will be told why
            return ""
        key = str((json.loads(body).get("fusion") or {}).get("stack", ""))
        self._keep(model, key)
        return key

    def learn(self, call: Call, head: Head) -> None:
        """Remember what an answer says: a profile's stack changes with its version."""
        if key := head.get(STACK):
            self._keep(call.find_model(), key)

    def _keep(self, model: str, key: str) -> None:
        if model:
            name = _digest(model)
            self._keys[name] = key
            self._keys.move_to_end(name)
            while len(self._keys) > MAX_STACKS:
                self._keys.popitem(last=False)


def _digest(model: str) -> bytes:
    return sha256(model.encode(errors="surrogatepass")).digest()


async def answer(call: Call, send: Send, stacks: Stacks) -> tuple[Head, AsyncIterator[bytes]]:
    """Head and body of the answer to `call`, by the replica of its stack, or by another one when that is lost before a
    byte of the body was passed on.

    Raises `ApiError` 502 when a change was lost, 503 when every try was.
    """
    key = await stacks.find(call)
    for pause in PAUSES_S:
        await asyncio.sleep(pause)
        parts = send(call, key)
        try:
            head, first = await _begin(parts)
        except ReplicaLostError:
            await parts.aclose()
            if not call.may_repeat:
                message = (
                    "The replica was lost while it made the change; look whether it was made, and repeat it if not."
                )
                raise ApiError(502, message) from None
        except BaseException:  # the client has gone
            await parts.aclose()
            raise
        else:
            stacks.learn(call, head)
            return head, _pass_on(call, head, first, parts)
    raise ApiError(503, "No replica could answer; try again.")


async def _begin(parts: AsyncIterator[Head | bytes]) -> tuple[Head, list[bytes]]:
    """The head, and of the body what has to be there before it is passed on: a stream's first part, all of another."""
    head = await anext(parts)
    assert isinstance(head, Head)
    is_stream = head.get(b"content-type").startswith("text/event-stream")
    held: list[bytes] = []
    async for part in parts:
        assert isinstance(part, bytes)
        held.append(part)
        if is_stream or sum(map(len, held)) > HELD_BYTES:
            break
    return head, held


async def _pass_on(
    call: Call, head: Head, first: list[bytes], parts: AsyncGenerator[Head | bytes, None]
) -> AsyncIterator[bytes]:
    async with aclosing(parts):
        for held in first:
            yield held
        try:
            async for part in parts:
                assert isinstance(part, bytes)
                yield part
        except ReplicaLostError:
            if not head.get(b"content-type").startswith("text/event-stream"):
                raise  # which cuts the connection: the client sees that bytes are missing
            yield error_event(call.path)


def error_event(path: str) -> bytes:
    """What ends a stream of events whose replica was lost, as the service itself ends one that fails."""
    shape: dict[str, Any]
    error = error_body(ApiError(502, "The replica was lost in the middle of the answer; try again."))
    if path.endswith("/v1/messages"):
        shape = {"type": "error", "error": {"type": "api_error", "message": error["error"]["message"]}}
        return f"\n\nevent: error\ndata: {json.dumps(shape)}\n\n".encode()
    if path.endswith("/v1/responses"):
        shape = {"type": "error", "code": "server_error", "message": error["error"]["message"], "param": None}
        return f"\n\nevent: error\ndata: {json.dumps(shape)}\n\n".encode()
    return f"\n\ndata: {json.dumps(error)}\n\ndata: [DONE]\n\n".encode()
