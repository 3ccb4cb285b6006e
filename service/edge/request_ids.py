"""Ids that clients give their requests and sessions: they return in answers and stand in logs."""

import re

from starlette.types import Scope

from service.edge.check import Check, header_values
from service.errors import ApiError
from service.validation import MAX_QUOTED

ID = re.compile(r"[A-Za-z0-9._:=+-]{1,128}")
HEADERS = ("X-Request-Id", "X-Session-Id")


class RequestIds(Check):
    """Answers 400 to an `X-Request-Id` or `X-Session-Id` that is not a plain id."""

    def check(self, scope: Scope) -> None:
        """Raise `ApiError` when the request has an id that is not plain."""
        for name in HEADERS:
            for value in header_values(scope, name.lower().encode()):
                check_id(value.decode("latin-1"), name)


def check_id(value: object, name: str) -> None:
    """Raise `ApiError` when `value`, of the header or body key `name`, is text that is not a plain id."""
    if isinstance(value, str) and not ID.fullmatch(value):
        message = f"{name!r} is {value[:MAX_QUOTED]!r}; expected 1 to 128 letters, digits or characters of '._:=+-'."
        raise ApiError(400, message, param=name)
