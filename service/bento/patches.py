"""What this service replaces inside BentoML, which has no option for it.

`install` checks every name before it replaces it, and `check_effect` looks at the app that BentoML has built: a
BentoML that moved something, or captured it earlier, is rejected with an error that names it.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import bentoml
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.server.http import instruments, traffic
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

SUPPORTED_BENTOML = ("1.4.39",)
METRICS, TIMEOUT = "RunnerTrafficMetricsMiddleware", "TimeoutMiddleware"
PATH = "fusion.path"

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


def _require(owner: Any, name: str, *parameters: str) -> Any:
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
    client = _require(BentoMLContainer, "metrics_client").get()
    _require(client, "multiproc")
    client.multiproc = False


def install(metric_path: Callable[[Scope], str]) -> None:
    """Replace what has to be; BentoML must not have built its app yet."""
    check_version(bentoml.__version__)
    _keep_metrics_in_memory()
    metrics = _require(instruments, METRICS, "app", "namespace", "skip_paths")
    timeout = _require(traffic, TIMEOUT, "app", "timeout")
    replaced.update({METRICS: (metrics, _bound_metrics(metrics, metric_path)), TIMEOUT: (timeout, NoTimeout)})
    setattr(instruments, METRICS, replaced[METRICS][1])
    setattr(traffic, TIMEOUT, NoTimeout)


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
        is_off = name == METRICS and app is not None and "/metrics" not in paths  # by BentoML's own configuration
        if original in layers or (replacement not in layers and not is_off):
            raise UnsupportedBentoMLError(
                f"BentoML {bentoml.__version__} does not run the replacement of its {name}: the patches had no effect"
            )
    if ValueClass is not MutexValue or BentoMLContainer.metrics_client.get().multiproc:
        raise UnsupportedBentoMLError(
            f"BentoML {bentoml.__version__} keeps metrics in files: prometheus_client was imported before the patches"
        )
