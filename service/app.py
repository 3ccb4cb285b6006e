"""The only file that imports BentoML: one worker, vLLM's API layer in its process."""

import asyncio
import json
import logging
import os
import signal
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

# BentoML counts for many workers, in files of one folder that all its servers of a machine share and each
# empties at its start: a second server would take the first one's series away, and series in files can
# never be dropped. There is one worker here, so its metrics live in memory. Metrics choose where they live
# when they are imported, so this comes first.
os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)

import bentoml
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.server.http import instruments, traffic
from bentoml._internal.server.http.instruments import RunnerTrafficMetricsMiddleware
from starlette.datastructures import Headers
from starlette.routing import Match, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from service import settings
from service.process import end_with_parent

if TYPE_CHECKING:  # vLLM takes seconds to import; the supervisor, which only reads this file, goes without
    from service.errors import ApiError
    from service.fusion_service import FusionService

BentoMLContainer.metrics_client.get().multiproc = False

log = logging.getLogger("fusion")

HEALTH_PATHS = ("/livez", "/readyz", "/healthz", "/metrics")
OPEN_PATHS = ("/health", "/ping")
"""vLLM's health checks, which need no key either."""
PATH = "fusion.path"
LAST_ANSWERS_S = 10
"""Left to answers on their way once the engine has died."""


class Front:
    """Routes of our own first, then the gate and vLLM's app; 503 until the engine is up, 401 without a key."""

    def __init__(self) -> None:
        self._service: FusionService | None = None
        self._own = Router()
        self._vllm: frozenset[str] = frozenset()

    def open(self, service: "FusionService") -> None:
        """Start answering for `service`."""
        from service.gate import Gate
        from service.routes import adapters, fusions, models

        self._own = Router([*adapters.routes(service), *fusions.routes(service), *models.routes(service)])
        self._vllm = frozenset(getattr(route, "path", "") for route in service.engine.app.routes)
        self._gate = Gate(
            service.engine.app, service.names, service.pool, service.metrics, strict=service.settings.strict
        )
        self._service = service

    def series(self, scope: Scope) -> str:
        """The path a request is counted under: its route's, so that the number of series is bounded."""
        path: str = scope["path"]
        for route in self._own.routes:
            if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
                return route.path
        return path if path in self._vllm or path in HEALTH_PATHS else "(other)"

    def shut(self) -> None:
        """Answer 503 from now on."""
        self._service = None

    def _refusal(self, scope: Scope) -> "ApiError | None":
        from service.errors import ApiError

        if self._service is None:
            return ApiError(503, "The engine is starting or stopping.")
        # vLLM would look at the key in its own routes alone, and after the gate has built what they name.
        keys = self._service.engine.keys
        free = keys is None or scope.get("method") == "OPTIONS" or scope["path"] in OPEN_PATHS
        if keys is not None and not free and not keys.verify_token(Headers(scope=scope)):
            return ApiError(401, "The API key is missing or wrong; expected the header 'Authorization: Bearer KEY'.")
        allowed: set[str] = set()
        for route in self._own.routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return None
            if match is Match.PARTIAL and isinstance(route, Route):
                allowed |= route.methods or set()
        if not allowed:
            return None
        return ApiError(405, f"{scope['method']} is not for {scope['path']}, which takes {', '.join(sorted(allowed))}.")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if refusal := self._refusal(scope):
            from service.errors import error_response

            await error_response(refusal)(scope, receive, send)
            return
        scope["root_path"] = ""
        for route in self._own.routes:
            if route.matches(scope)[0] is not Match.NONE:
                await self._own(scope, receive, send)
                return
        await self._gate(scope, receive, send)


front = Front()


class _Restore:
    """Inside BentoML's metrics: gives a request its path back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if PATH in scope:
            scope["path"] = scope[PATH]
        await self._app(scope, receive, send)


class BoundedMetrics(RunnerTrafficMetricsMiddleware):  # type: ignore[misc]  # BentoML has no types
    """BentoML's request metrics; it labels by the raw path, of which clients can think up any number."""

    def __init__(self, app: ASGIApp, **options: Any) -> None:
        super().__init__(_Restore(app), **options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] in ("http", "websocket"):
            scope = {**scope, PATH: scope["path"], "path": front.series(scope)}
        await super().__call__(scope, receive, send)


class NoTimeout:
    """In the place of BentoML's timeout, which keeps a timer of each request for all of the time it allows, and never
    ends a request whose answer never starts: the client's going away.
    """

    def __init__(self, app: ASGIApp, timeout: float) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        await self._app(scope, receive, send)


instruments.RunnerTrafficMetricsMiddleware = BoundedMetrics
traffic.TimeoutMiddleware = NoTimeout


class Health:
    """Answers `/readyz` with what is ready: 200 or 503, and whether mixing is proven."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["path"] != "/readyz":
            await self._app(scope, receive, send)
            return
        service = front._service
        ready = service is not None and service.engine.alive
        state: dict[str, Any] = {"ready": ready}
        if service is not None:
            proof = service.proof
            state["mixing"] = {
                "proven": proof.proven,
                "reason": proof.reason,
                "error": proof.error,
                "effect": proof.effect,
            }
        content = json.dumps(state).encode()
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200 if ready else 503, "headers": headers})
        await send({"type": "http.response.body", "body": content})


def _end_server() -> None:
    # BentoML's supervisor would start this worker again and again, to fail in the same way. Process 1 is
    # the supervisor in a container only; elsewhere it means that the supervisor is gone.
    if os.getppid() != 1 or "BENTOML_CONTAINERIZED" in os.environ:
        os.kill(os.getppid(), signal.SIGTERM)


async def _end_with(service: "FusionService") -> None:
    """End this worker once its engine has died; the supervisor then starts a fresh one."""
    while service.engine.alive:
        await asyncio.sleep(1)
    log.error("the engine has died; this worker ends and is started afresh")
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(LAST_ANSWERS_S)
    os._exit(1)  # what still waits for an answer of that engine would keep it for ever


@bentoml.service(name="lora-fusion", workers=1, traffic={"timeout": 24 * 3600, "max_concurrency": 4096})
@bentoml.asgi_app(front, path="/")
class LoraFusion:
    """Start and stop with the Bento worker."""

    service: "FusionService"

    @bentoml.on_startup  # type: ignore[untyped-decorator]  # BentoML's are
    async def start(self) -> None:
        """Start the engine; a failure ends the whole server with its reason."""
        from service.startup import open_service

        end_with_parent()
        log.disabled = False  # BentoML's set-up of logging switches off the loggers that were there before it
        log.setLevel(logging.INFO)
        configuration = settings.read()
        self._opened = AsyncExitStack()
        try:
            self.service = await self._opened.enter_async_context(open_service(configuration))
        except BaseException as error:
            log.error("could not start", exc_info=error)
            (configuration.data / settings.START_FAILURE).write_text(f"{error or type(error).__name__}")
            _end_server()
            raise
        self._watch = asyncio.create_task(_end_with(self.service))
        front.open(self.service)
        log.info("ready")

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]  # BentoML's are
    async def stop(self) -> None:
        """Requests are drained by the server before this."""
        front.shut()
        if hasattr(self, "_watch"):
            self._watch.cancel()
        await self._opened.aclose()

    async def __is_alive__(self) -> bool:
        engine = getattr(getattr(self, "service", None), "engine", None)
        return engine is None or engine.alive


LoraFusion.add_asgi_middleware(Health)  # type: ignore[attr-defined]  # from BentoML's decorator
