"""The app that BentoML mounts: the service's own routes, and the intake and vLLM's app behind them."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fastapi import FastAPI, HTTPException as FastAPIHTTPException
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from adapters import FusionError
from service.edge.access import ASSETS_PATH, BENTOML_PATHS, Access, allowed_hosts
from service.edge.clients import Shares
from service.engine.routes import OPTIONAL
from service.errors import ApiError, error_response
from service.roles import check_role
from service.tracing import TraceEngine
from service.validation import describe_union_fault

log = logging.getLogger("fusion")

if TYPE_CHECKING:  # vLLM takes seconds to import; BentoML's supervisor, which only imports this file, needs none of it
    from service.fusion_service import FusionService

DRAINING = "the server is about to stop"
SEGMENT = "!$&'()*+,;=:@"
"""What a segment of a path may have besides letters, digits and `-._~` (RFC 3986, 3.3)."""
HEALTH_PATHS = ("/health", "/ping")
"""vLLM's health checks, which routers read; `/readyz` says why."""
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


async def answer_error(request: Request, error: Exception) -> Response:
    """Answer in OpenAI's error shape; 404 and 405 of a router say what there is."""
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        scope = dict(request.scope)
        if "app_root_path" in scope:  # inside a mount, whose own path counts as the root
            scope["root_path"] = scope["app_root_path"]
        error = routing_error(request.app.routes, scope)
    return error_response(error)


def routing_error(routes: Iterable[BaseRoute], scope: Scope) -> ApiError:
    """Why none of `routes` takes a request: 404, or 405 with the methods of every route with its path."""
    path, method = scope["path"], scope["method"]
    matching = [route for route in routes if route.matches(scope)[0] is not Match.NONE]
    allowed = sorted({method for route in matching for method in getattr(route, "methods", None) or ()})
    if "GET" in allowed or path in BENTOML_PATHS:
        allowed = sorted({*allowed, "GET", "HEAD"})
    if not allowed and (flag := OPTIONAL.get(("GET", path))):
        return ApiError(404, f"{path!r} is served when FUSION_ENGINE_ARGS has vLLM's {flag}.")
    if not allowed:
        return ApiError(404, f"No route has the path {path[:100]!r}; /docs lists all routes.")
    message = f"{method} is not allowed on {path[:100]!r}; expected {' or '.join(allowed)}."
    return ApiError(405, message, headers={"allow": ", ".join(allowed)})


class RouteFilter:
    """An ASGI app that passes on what one of `routes` takes: what is not served must not reach the intake.

    HEAD is what GET takes; the HTTP server sends no body then.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 404 or 405, or 403 to a caller without the route's role."""
        child = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        route = next((route for route in self._routes if route.matches(child)[0] is Match.FULL), None)
        try:
            if route is None:
                raise routing_error(self._routes, scope)
            check_role(scope, getattr(route, "path", ""))
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        else:
            await self._app(child, receive, send)


class FinalSlashes:
    """An ASGI app that answers 307 to a path with a final slash where one of `routes` has it without.

    The new place is relative: behind a proxy, the path that the client sees may begin otherwise.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or say where the route is."""
        path = scope["path"] if scope["type"] == "http" else ""
        plain = path.removesuffix("/")
        raw = scope.get("raw_path") or path.encode()  # names in it may have slashes of their own, percent-encoded
        is_final = plain != path and raw.endswith(b"/") and not plain.endswith("/")
        if is_final and self._has_route({**scope, "path": plain}):
            query = f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else ""
            place = f"../{quote(raw[:-1].rpartition(b'/')[2], safe=SEGMENT + '%')}{query}"
            message = f"The path ends in a slash; use {plain[:100]!r}."
            await error_response(ApiError(307, message, headers={"location": place}))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _has_route(self, scope: Scope) -> bool:
        return any(route.matches(scope)[0] is not Match.NONE for route in self._routes)


async def answer_invalid(request: Request, error: RequestValidationError) -> Response:
    """Answer 400 to a body that one of vLLM's routes does not take."""
    message, param = describe_union_fault(error.errors())
    return error_response(ApiError(400, message, param=param))


async def answer_wrong_type(request: Request, error: TypeError) -> Response:
    """Answer 400, as vLLM does, without the error's text, which is about Python."""
    log.warning("a request failed with a wrong type", exc_info=error)
    return error_response(ApiError(400, "A value in the request has the wrong type; the server's log says more."))


async def answer_too_deep(request: Request, error: RecursionError) -> Response:
    """Answer 400: bodies have a bound of depth, but a text in one may be JSON again, as the arguments of a tool are."""
    log.warning("a request failed with too deep a value: %s", error)
    return error_response(ApiError(400, "A value in the request is nested too deeply."))


def build_app(service: "FusionService") -> FastAPI:
    """The service's own routes; the intake and vLLM's app behind it answer all others."""
    from service.engine.dry_run import dry_run
    from service.follower import MAX_WAITING
    from service.intake import Intake
    from service.receipt_keys import read_receipt_key
    from service.routes import docs, page
    from service.routes.models import ModelList
    from service.routes.openapi import OWN_ROUTERS

    app = FastAPI(
        openapi_url=None,  # the document of both apps is a route of its own
        redirect_slashes=False,
        exception_handlers=dict.fromkeys((*EXPECTED, Exception), answer_error),  # the last one logs, too
    )
    app.state.service = service
    app.state.models = ModelList(service)
    app.state.shares = Shares(min(MAX_WAITING, service.settings.max_waiting))  # no more than the shortest queue takes
    for router in OWN_ROUTERS:
        app.include_router(router)
    docs.add_routes(app, service.engine, ASSETS_PATH)
    app.router.routes += page.ROUTES
    vllm = service.engine.app
    # Its own handler is for FastAPI's errors only.
    vllm.exception_handlers |= dict.fromkeys((HTTPException, FastAPIHTTPException, Exception), answer_error)
    vllm.exception_handlers |= {RequestValidationError: answer_invalid, TypeError: answer_wrong_type}
    vllm.exception_handlers[RecursionError] = answer_too_deep
    app.add_middleware(FinalSlashes, routes=[*app.routes, *vllm.routes])
    gate = Intake(
        TraceEngine(vllm, lambda: dry_run.get() is not None),
        service.names,
        service.pool,
        service.metrics,
        strict=service.settings.strict,
        fair=service.settings.fairness_id,
        priorities=service.settings.priorities,
        policy=service.policy,
        receipt_key=read_receipt_key(service.settings.receipt_key),
        limits=service.limits,
    )
    app.router.default = RouteFilter(gate, vllm.routes)
    return app


def describe_access(service: "FusionService") -> dict[str, bool]:
    """Whether requests need a key, and whether they are answered on loopback addresses alone."""
    keys = service.keys.ring.is_asked
    return {"keys": keys, "loopback_only": not keys and not service.settings.keyless}


class Front:
    """An ASGI app that answers for the service while its engine lives, and 503 before, between and after."""

    def __init__(self) -> None:
        self._service: FusionService | None = None
        self._app: ASGIApp = self._answer_unavailable
        self._state = ("starting", "the engine is starting")
        self._routes: list[Any] = []
        self.access = Access()
        """What the edge asks of requests; kept when the service stops."""
        self.draining = False
        """Whether health checks say no, while requests are still answered."""

    def start(self, service: "FusionService") -> None:
        """Answer for `service` from now on, as long as its engine lives."""
        app = build_app(service)
        self._routes = [*app.routes, *service.engine.app.routes]
        ring = service.keys.ring
        self.access = Access(
            started=True,
            hosts=allowed_hosts(service.settings),
            identify=ring.identify,
            keyless=service.settings.keyless,
            cors=service.engine.cors,
            public_metrics=service.settings.public_metrics,
        )
        self._state = ("restarting", "the engine died")
        self._service, self._app = service, app

    def stop(self, state: str = "stopping", reason: str = "the server is stopping") -> None:
        """Answer 503 from now on, and say why; requests in flight are not affected."""
        self._state = (state, reason)
        self._service, self._app = None, self._answer_unavailable

    def drain(self) -> bool:
        """Have health checks say no from now on: routers are to send nothing more here before anything is refused.

        Returns whether requests are answered now.
        """
        self.draining = True
        return self._service is not None

    async def _answer_unavailable(self, scope: Scope, receive: Receive, send: Send) -> None:
        from service.routes.page import answer_page  # with what the supervisor needs not import

        if scope["type"] == "http" and await answer_page(scope, receive, send):
            return
        reason = self._state[1]
        message = f"{reason[0].upper()}{reason[1:]}; wait until /readyz returns 200."
        await error_response(ApiError(503, message))(scope, receive, send)

    def metric_path(self, scope: Scope) -> str:
        """The path a request is counted under: its route's, so that the number of series is bounded."""
        path: str = scope["path"]
        for route in self._routes:
            if route.matches(scope)[0] is not Match.NONE:
                return str(route.path).replace(":name}", "}").replace(":profile}", "}")
        return path if path in BENTOML_PATHS else "(other)"

    def readiness(self) -> dict[str, Any]:
        """Whether requests are answered, whether mixing is proven, how many requests were ended because their numbers
        overflowed, and whether the registry's database answers; or why they are not answered: the body of `/readyz`.
        """
        if self._service is None or not self._service.engine.alive or self.draining:
            state, reason = ("draining", DRAINING) if self.draining and self._service is not None else self._state
            return {"ready": False, "state": state, "reason": reason}
        proof = self._service.proof
        mixing = {"proven": proof.proven, "reason": proof.reason, "error": proof.error, "effect": proof.effect}
        mixing |= {"tables": proof.tables, "phases": proof.phases, "limits": proof.limits}
        mixing |= {"engines": proof.engines, "ranks": proof.ranks}
        overflows = self._service.engine.overflows
        nonfinite = {"requests": overflows.count, "last": overflows.last}
        outage = self._service.registry.outage
        registry = {"current": outage is None} | ({} if outage is None else asdict(outage))
        access = describe_access(self._service)
        return {"ready": True, "mixing": mixing, "nonfinite": nonfinite, "registry": registry, "access": access}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; BentoML's mount at `/` adds nothing to its path."""
        if self.draining and scope["path"] in HEALTH_PATHS:
            await error_response(ApiError(503, f"{DRAINING[0].upper()}{DRAINING[1:]}."))(scope, receive, send)
            return
        lives = self._service is not None and self._service.engine.alive
        await (self._app if lives else self._answer_unavailable)({**scope, "root_path": ""}, receive, send)
