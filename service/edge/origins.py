"""Requests that a web page of another site makes: refused, unless vLLM's `--allowed-origins` names the site."""

from collections.abc import Callable, Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.edge.access import Access
from service.edge.check import Check, header_values
from service.errors import ApiError, error_response

EXPOSED = (
    *("X-Fusion-Digest", "X-Fusion-Recipe", "X-Fusion-Mode", "X-Fusion-Source", "X-Fusion-Rank", "X-Fusion-Error"),
    *(
        "X-Fusion-Stack",
        "X-Fusion-Weights",
        "X-Fusion-Gate",
        "X-Fusion-Receipt",
        "X-Request-Id",
        "X-Session-Id",
        "Retry-After",
        *(f"X-RateLimit-{part}-{kind}" for part in ("Limit", "Remaining", "Reset") for kind in ("Requests", "Tokens")),
        "Content-Disposition",
    ),
)
"""Headers of answers that pages of allowed origins may read besides those that browsers let all pages read."""
DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class Origins(Check):
    """Answers 403 to requests of a web page of another site.

    The body's content type makes browsers ask before most such requests; this holds for the rest: GETs, which may
    build something, and bodies that a page sends as JSON.
    """

    def check(self, scope: Scope) -> None:
        """Raise `ApiError` when the browser says that another site makes this request."""
        origins, sites = header_values(scope, b"origin"), header_values(scope, b"sec-fetch-site")
        if not origins and not sites:
            return  # no browser, or a page's own GET in an old one
        access = self.access()
        allowed = access.cors.get("allow_origins", ())
        if "*" in allowed or (len(origins) == 1 and origins[0].decode("latin-1") in allowed):
            return
        hosts = header_values(scope, b"host")
        same = all(site in (b"same-origin", b"none") for site in sites) and (
            not origins or (len(origins) == len(hosts) == 1 and is_same_site(origins[0], hosts[0]))
        )
        if not same and not access.is_open(scope["method"], scope["path"]):
            message = "Web pages of other sites may not use this server; vLLM's --allowed-origins can allow a site."
            raise ApiError(403, message)


def is_same_site(origin: bytes, host: bytes) -> bool:
    """Whether `origin` is what a browser sends for pages of `host`; the scheme is a proxy's choice."""
    scheme, separator, place = origin.decode("latin-1").lower().partition("://")
    port = DEFAULT_PORTS.get(scheme)
    if not separator or port is None:
        return False  # `null`, an extension, a file
    return place.removesuffix(port) == host.decode("latin-1").lower().removesuffix(port)


class Cors:
    """Lets pages of the allowed origins read every answer, errors too; without allowed origins it does nothing."""

    def __init__(self, app: ASGIApp, access: Callable[[], Access]) -> None:
        self.app = app
        self._access = access
        self._options: Mapping[str, Any] = {}
        self._cors: ASGIApp = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer preflight requests of allowed origins, and add CORS headers to answers."""
        options = self._access().cors
        if options is not self._options:
            self._options = options
            is_open = bool(options.get("allow_origins"))
            self._cors = _JsonCors(self.app, expose_headers=EXPOSED, **options) if is_open else self.app
        await self._cors(scope, receive, send)


class _JsonCors(CORSMiddleware):
    """Starlette's, with its errors in the shape of all errors."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            origin = Headers(scope=scope).get("origin")
            if origin is None or not self.is_allowed_origin(origin):
                await self.app(scope, receive, send)  # refused further in
                return
        await super().__call__(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        headers = {key: value for key, value in response.headers.items() if not key.startswith("content-")}
        message = "A method or header is not allowed; vLLM's --allowed-methods and --allowed-headers name them."
        return error_response(ApiError(400, message, headers=headers))
