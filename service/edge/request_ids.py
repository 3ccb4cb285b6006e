"""Ids that clients give their requests and sessions: they return in answers and stand in logs."""

import re

from starlette.types import Message, Receive, Scope, Send

from service.edge.check import Check, header_values
from service.errors import ApiError
from service.validation import MAX_QUOTED

ID = re.compile(r"[A-Za-z0-9._:=+-]{1,128}")
HEADERS = ("X-Request-Id", "X-Session-Id")


class RequestIds(Check):
    """Answers 400 to an `X-Request-Id` or `X-Session-Id` that is not a plain id, and returns plain ones."""

    def check(self, scope: Scope) -> None:
        """Raise `ApiError` when the request has an id that is not plain."""
        for name in HEADERS:
            for value in header_values(scope, name.lower().encode()):
                check_id(value.decode("latin-1"), name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the fault of a request, or pass it on and put its ids into the answer's headers."""
        names = [name.lower().encode() for name in HEADERS]
        ids = (
            [(name, values[0]) for name in names if (values := header_values(scope, name))]
            if "headers" in scope
            else []
        )

        async def send_ids(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                known = {name.lower() for name, _ in headers}
                message = {**message, "headers": headers + [pair for pair in ids if pair[0] not in known]}
            await send(message)

        # An id at fault must not return: it may be anything.
        is_plain = all(ID.fullmatch(value.decode("latin-1")) for _, value in ids)
        await super().__call__(scope, receive, send_ids if ids and is_plain else send)


def check_id(value: object, name: str) -> None:
    """Raise `ApiError` when `value`, of the header or body key `name`, is text that is not a plain id."""
    if isinstance(value, str) and not ID.fullmatch(value):
        message = f"{name!r} is {value[:MAX_QUOTED]!r}; expected 1 to 128 letters, digits or characters of '._:=+-'."
        raise ApiError(400, message, param=name)
