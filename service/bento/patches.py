"""What this service replaces inside BentoML, which has no option for it.

`install` checks every name before it replaces it, and `check_effect` looks at the app that BentoML has built: a
BentoML that moved something, or captured it earlier, is rejected with an error that names it.
"""

import inspect
import os
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import bentoml
import uvicorn.config
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.server.http import access, instruments, traffic
from opentelemetry.instrumentation import asgi
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.callers import hide_secrets
from service.edge.access import BENTOML_PATHS
from service.edge.connections import Connections
from service.edge.protocol import BoundedProtocol
from service.tracing import QUIET, traces

SUPPORTED_BENTOML = ("1.4.39",)
METRICS, TIMEOUT, ACCESS = "RunnerTrafficMetricsMiddleware", "TimeoutMiddleware", "AccessLogMiddleware"
TRACES = "OpenTelemetryMiddleware"
PATH, SCOPE = "fusion.path", "fusion.scope"
MAX_LOGGED = 200
"""Characters of a path or a header that the access log repeats."""
LOGGED, TRACED = (b"content-type", b"content-length"), (b"host", b"user-agent", b"traceparent", b"tracestate")
"""Headers that BentoML's access log reads, and those that OpenTelemetry's middleware may see."""
MAX_TRACED = 512
"""Bytes of each of the latter; a `tracestate` has no more."""

ACCESS_OPTIONS = [f"has_{way}_content_{what}" for way in ("request", "response") for what in ("length", "type")]

replaced: dict[str, tuple[type, type]] = {}
"""Original and replacement, by BentoML's name."""


class UnsupportedBentoMLError(RuntimeError):
    """This BentoML is not one whose internals the patches fit."""


def check_version(version: str) -> None:
    """Raise `UnsupportedBentoMLError` unless `version` is a supported one."""
    if version not in SUPPORTED_BENTOML:
        raise UnsupportedBentoMLError(
            f"BentoML {version!r} is not a version this service knows; expected one of "
            f"{', '.join(SUPPORTED_BENTOML)}. Install the pins in requirements/."
        )


def require(owner: Any, name: str, *parameters: str) -> Any:
    """The attribute `name` of `owner`, when it is there and takes exactly `parameters` (if any are given)."""
    place = f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
    if not hasattr(owner, name):
        raise UnsupportedBentoMLError(f"BentoML {bentoml.__version__} has no {place}: the patches do not fit")
    value = getattr(owner, name)
    if parameters and (actual := tuple(inspect.signature(value).parameters)) != parameters:
        raise UnsupportedBentoMLError(
            f"{place} of BentoML {bentoml.__version__} takes ({', '.join(actual)}), expected ({', '.join(parameters)})"
        )
    return value


class _RestorePath:
    """Inside BentoML's metrics: gives a request its own path back."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if PATH in scope:
            scope["path"] = scope[PATH]
        await self.app(scope, receive, send)


def _bound_metrics(original: Any, metric_path: Callable[[Scope], str]) -> type:
    """BentoML's request metrics under `metric_path`: it labels by raw paths, which clients can invent endlessly."""

    class BoundedMetrics(original):  # type: ignore[misc]  # BentoML has no types
        def __init__(self, app: ASGIApp, **options: Any) -> None:
            super().__init__(_RestorePath(app), **options)

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] in ("http", "websocket"):
                scope = {**scope, PATH: scope["path"], "path": metric_path(scope)}
            await super().__call__(scope, receive, send)

    return BoundedMetrics


class _RestoreScope:
    """Inside BentoML's access log, or its traces: gives a request its own scope back."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope.get(SCOPE, scope), receive, send)


def _bound_access_log(original: Any) -> type:
    """BentoML's access log of short ASCII: it decodes the content type as UTF-8, and fails before an answer's end."""

    class BoundedAccessLog(original):  # type: ignore[misc]  # BentoML has no types
        def __init__(self, app: ASGIApp, **options: Any) -> None:
            super().__init__(_RestoreScope(app), **options)

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                scope = _shorten(scope, LOGGED, MAX_LOGGED)
            await super().__call__(scope, receive, send)

    return BoundedAccessLog


def _shorten(scope: Scope, names: Collection[bytes], limit: int) -> Scope:
    """`scope` with short ASCII in the headers of these names, and no others; the path has no API key's secret."""
    headers = [
        (name, value[:limit].decode("latin-1").encode("ascii", "backslashreplace"))
        for name, value in scope["headers"]
        if name in names
    ]
    return {**scope, SCOPE: scope, "headers": headers, "path": hide_secrets(scope["path"])[:MAX_LOGGED]}


def _trace_requests(original: Any) -> type:
    """BentoML's traces with a span for each request: those of each message are one for every token of a stream.

    They stand before all checks, also where nothing is traced, and fail for bytes that they cannot decode.
    """

    class RequestTraces(original):  # type: ignore[misc]  # it has no types
        def __init__(self, app: ASGIApp, **options: Any) -> None:
            if traces.provider is not None:
                options |= {"tracer_provider": traces.provider, "excluded_urls": QUIET}
            super().__init__(_RestoreScope(app), **options, exclude_spans=["receive", "send"])

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] in ("http", "websocket"):
                scope = {**_shorten(scope, TRACED, MAX_TRACED), "query_string": b""}
            await super().__call__(scope, receive, send)

    return RequestTraces


class NoTimeout:
    """Replaces BentoML's timeout middleware, which holds a timer per request for the full timeout and does not cancel
    requests whose response has not started when the client disconnects.
    """

    def __init__(self, app: ASGIApp, timeout: float) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on."""
        await self.app(scope, receive, send)


def _keep_metrics_in_memory() -> None:
    # BentoML counts for many workers, in files of one folder that all its servers on a machine share and each empties
    # when it starts: a second server would take the first one's series away, and series in files can never be dropped.
    # There is one worker here. prometheus_client decides when it is imported, so this comes before that.
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    client = require(BentoMLContainer, "metrics_client").get()
    require(client, "multiproc")
    client.multiproc = False
    require(client, "generate_latest")
    from service.exposition import TextWriter

    client.generate_latest = TextWriter().write


def install(metric_path: Callable[[Scope], str]) -> None:
    """Replace what has to be; BentoML must not have built its app yet."""
    check_version(bentoml.__version__)
    _keep_metrics_in_memory()
    metrics = require(instruments, METRICS, "app", "namespace", "skip_paths")
    timeout = require(traffic, TIMEOUT, "app", "timeout")
    log = require(access, ACCESS, "app", *ACCESS_OPTIONS, "skip_paths")
    replaced.update({METRICS: (metrics, _bound_metrics(metrics, metric_path)), TIMEOUT: (timeout, NoTimeout)})
    traces = require(asgi, TRACES)
    replaced.update({ACCESS: (log, _bound_access_log(log)), TRACES: (traces, _trace_requests(traces))})
    for module, name in ((instruments, METRICS), (traffic, TIMEOUT), (access, ACCESS), (asgi, TRACES)):
        setattr(module, name, replaced[name][1])


def remove_routes(app: Starlette) -> None:
    """Remove BentoML's own routes but its health checks and metrics, so that the front answers for the others."""
    app.router.routes[:] = [route for route in app.routes if getattr(route, "path", "") in ("", *BENTOML_PATHS)]


_PROTOCOL = {
    "connection_made": ("self", "transport"),
    "connection_lost": ("self", "exc"),
    "data_received": ("self", "data"),
    "pause_writing": ("self",),
    "resume_writing": ("self",),
    "on_message_begin": ("self",),
    "on_header": ("self", "name", "value"),
    "on_headers_complete": ("self",),
    "on_body": ("self", "body"),
    "on_message_complete": ("self",),
    "on_response_complete": ("self",),
    "send_400_response": ("self", "msg"),
    "_unsupported_upgrade_warning": ("self",),
}
"""What `BoundedProtocol` extends in uvicorn's protocol."""
_CYCLE = ("transport", "message_event", "disconnected", "response_started", "response_complete", "more_body", "scope")
"""What it reads or sets of a request."""


def bound_connections(connections: Connections) -> None:
    """Have uvicorn make its connections as `BoundedProtocol`; BentoML passes no protocol of its own to uvicorn."""
    for name, parameters in _PROTOCOL.items():
        require(HttpToolsProtocol, name, *parameters)
    cycle = inspect.getsource(require(RequestResponseCycle, "__init__"))
    for name in (*_CYCLE, "waiting_for_100_continue"):
        if f"self.{name} = " not in cycle:
            raise UnsupportedBentoMLError(f"RequestResponseCycle of uvicorn {uvicorn.__version__} has no {name}")
    # uvicorn believes `X-Forwarded-For` of a loopback peer, which on a server without a proxy is any client.
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "")
    require(uvicorn.config, "HTTP_PROTOCOLS")
    protocols: dict[str, Any] = uvicorn.config.HTTP_PROTOCOLS  # names by uvicorn's types; `load` takes objects as well
    protocols["auto"] = partial(BoundedProtocol, connections)


def _layers(app: Starlette) -> Iterator[object]:
    """The middleware of a running app, from the outside in."""
    layer = app.middleware_stack
    while layer is not None:
        yield layer
        layer = getattr(layer, "app", None)


def check_effect(app: Starlette | None) -> None:
    """Raise `UnsupportedBentoMLError` unless BentoML's running `app` uses each replacement; None: it showed no app."""
    from prometheus_client.values import MutexValue, ValueClass

    layers = set() if app is None else {type(layer) for layer in _layers(app)}
    paths = set() if app is None else {getattr(route, "path", "") for route in app.routes}
    for name, (original, replacement) in replaced.items():
        # By BentoML's own configuration.
        is_off = app is not None and (name == ACCESS or (name == METRICS and "/metrics" not in paths))
        if original in layers or (replacement not in layers and not is_off):
            raise UnsupportedBentoMLError(
                f"BentoML {bentoml.__version__} does not run the replacement of its {name}: the patches had no effect"
            )
    if not isinstance(uvicorn.config.HTTP_PROTOCOLS["auto"], partial):
        raise UnsupportedBentoMLError(
            f"uvicorn {uvicorn.__version__} does not make its connections as `BoundedProtocol`"
        )
    if ValueClass is not MutexValue or BentoMLContainer.metrics_client.get().multiproc:
        raise UnsupportedBentoMLError(
            f"BentoML {bentoml.__version__} keeps metrics in files: prometheus_client was imported before the patches"
        )
