"""The form of the edge's middlewares: a check of the request's head, whose error is the answer."""

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from service.edge.access import Access
from service.errors import ApiError, error_response


class Check:
    """ASGI middleware that answers a request with the `ApiError` of `check`, and passes on what has none.

    It sees the head alone, once a request: nothing is done to the parts of a body or of an answer.
    """

    def __init__(self, app: ASGIApp, access: Callable[[], Access] = Access) -> None:
        self.app = app
        self.access = access

    def check(self, scope: Scope) -> None:
        """Raise `ApiError` when the head of the request in `scope` is at fault."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the fault of a request, or pass it on."""
        if scope["type"] == "http":
            try:
                self.check(scope)
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    """All values of the header `name` (lower case), in order."""
    return [value for key, value in scope["headers"] if key == name]
