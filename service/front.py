"""The app that BentoML mounts: the service's own routes, and the gate and vLLM's app behind them."""

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from adapters import FusionError
from service.errors import ApiError, error_response

if TYPE_CHECKING:  # vLLM takes seconds to import; BentoML's supervisor, which only imports this file, needs none of it
    from service.fusion_service import FusionService

HEALTH_PATHS = ("/livez", "/readyz", "/healthz", "/metrics")
"""BentoML's own routes."""
OPEN_PATHS = ("/health", "/ping", "/docs", "/openapi.json")
"""What may be read without a key, with all of ASSETS_PATH: vLLM's health checks and the API's description."""
ASSETS_PATH = "/docs/assets"
EXPECTED = (
    ApiError,
    ClientDisconnect,
    FusionError,
    HTTPException,
    OSError,
    RequestValidationError,
    SQLAlchemyError,
)
"""Errors that are answered without a line in the log."""


class RequireKey:
    """ASGI middleware that answers 401 unless a request has one of the API keys.

    vLLM checks keys for some of its own routes only, and after the gate has built what a request names.
    """

    def __init__(self, app: ASGIApp, keys: Any) -> None:
        self.app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let preflight requests, reads of open paths and requests with a key through."""
        path, method = scope["path"], scope.get("method")
        is_open = path in OPEN_PATHS or path.startswith(f"{ASSETS_PATH}/")
        may_pass = method == "OPTIONS" or (method in ("GET", "HEAD") and is_open)  # a POST reaches the gate
        if may_pass or self._keys.verify_token(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        message = "The API key is missing or wrong; expected the header 'Authorization: Bearer KEY'."
        await error_response(ApiError(401, message))(scope, receive, send)


async def answer_unavailable(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 503 to anything."""
    error = ApiError(503, "The engine is starting or stopping; wait until /readyz returns 200.")
    await error_response(error)(scope, receive, send)


async def answer_error(request: Request, error: Exception) -> Response:
    """Answer in OpenAI's error shape; 405 lists the methods of every route with this path."""
    if getattr(error, "status_code", None) == 405:
        matching = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        allowed = sorted({method for route in matching for method in getattr(route, "methods", None) or ()})
        message = f"{request.method} is not allowed on {request.url.path!r}; expected {' or '.join(allowed)}."
        error = ApiError(405, message, headers={"allow": ", ".join(allowed)})
    return error_response(error)


def build_app(service: "FusionService") -> FastAPI:
    """The service's own routes; the gate and vLLM's app behind it answer all others."""
    from service.gate import Gate
    from service.routes import docs
    from service.routes.openapi import OWN_ROUTERS

    keys = service.engine.keys
    app = FastAPI(
        openapi_url=None,  # the document of both apps is a route of its own
        redirect_slashes=False,
        exception_handlers=dict.fromkeys((*EXPECTED, Exception), answer_error),  # the last one logs, too
        middleware=[] if keys is None else [Middleware(RequireKey, keys=keys)],
    )
    app.state.service = service
    for router in OWN_ROUTERS:
        app.include_router(router)
    docs.add_routes(app, service.engine, ASSETS_PATH)
    gate = Gate(service.engine.app, service.names, service.pool, service.metrics, strict=service.settings.strict)
    app.router.default = gate
    return app


class Front:
    """An ASGI app that answers 503 before `start` and after `stop`, and for the service in between."""

    def __init__(self) -> None:
        self._service: FusionService | None = None
        self._app: ASGIApp = answer_unavailable
        self._routes: list[Any] = []
        self._vllm_paths: frozenset[str] = frozenset()

    def start(self, service: "FusionService") -> None:
        """Answer for `service` from now on."""
        app = build_app(service)
        self._routes = app.routes
        self._vllm_paths = frozenset(getattr(route, "path", "") for route in service.engine.app.routes)
        self._service, self._app = service, app

    def stop(self) -> None:
        """Answer 503 from now on; requests in flight are not affected."""
        self._service, self._app = None, answer_unavailable

    def metric_path(self, scope: Scope) -> str:
        """The path a request is counted under: its route's, so that the number of series is bounded."""
        path: str = scope["path"]
        for route in self._routes:
            if route.matches(scope)[0] is not Match.NONE:
                return str(route.path)
        return path if path in self._vllm_paths or path in HEALTH_PATHS else "(other)"

    def readiness(self) -> dict[str, Any]:
        """Whether requests are answered, and whether mixing is proven: the body of `/readyz`."""
        if self._service is None:
            return {"ready": False}
        proof = self._service.proof
        mixing = {"proven": proof.proven, "reason": proof.reason, "error": proof.error, "effect": proof.effect}
        return {"ready": self._service.engine.alive, "mixing": mixing}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; BentoML's mount at `/` adds nothing to its path."""
        await self._app({**scope, "root_path": ""}, receive, send)
