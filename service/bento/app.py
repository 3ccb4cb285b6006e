"""The service class that `bentoml serve service.bento.app:LoraFusion` loads: one worker, vLLM's API in its process."""

import asyncio
import json
import logging
import os
import signal
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import bentoml
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from service import settings
from service.bento import draining, patches, supervisor
from service.edge.access import BENTOML_PATHS
from service.edge.bodies import LimitBodies
from service.edge.clients import LimitRequests
from service.edge.connections import Connections, derive_limits
from service.edge.faults import Faults
from service.edge.hosts import Hosts
from service.edge.keys import RequireKey
from service.edge.media_types import MediaTypes
from service.edge.origins import Cors, Origins
from service.edge.paths import Paths
from service.edge.request_ids import RequestIds
from service.edge.request_log import RequestLog, log as access_log
from service.engine.base_folder import BaseModelError
from service.errors import RETRY_AFTER_S
from service.front import Front
from service.json_logs import use_json
from service.life import keep_service
from service.logs import escape_records
from service.process import kill_descendants
from service.pulse import PULSE_FD, Pulse
from service.tracing import find_collector, traces

log = logging.getLogger("fusion")

escape_records()
front = Front()
patches.install(front.metric_path)
if PULSE_FD in os.environ and (collector := find_collector()) is not None:  # in the worker alone
    traces.start(collector)
configuration = settings.read_settings()
patches.bound_connections(Connections(lambda: derive_limits(configuration)))
supervisor.install()
draining.install(front.drain, configuration.drain_s)
running_app: ContextVar[Starlette] = ContextVar("running_app")
"""BentoML's own app while it starts."""


class Readiness:
    """ASGI middleware that answers `/readyz`, and shows the startup hook the app that BentoML has built."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 or 503 with `Front.readiness`; everything else is passed on."""
        if scope["type"] == "lifespan":
            running_app.set(scope["app"])
            patches.remove_routes(scope["app"])
        if scope["type"] != "http" or scope["path"] != "/readyz":
            await self.app(scope, receive, send)
            return
        state = front.readiness()
        headers = [(b"content-type", b"application/json")]
        if not state["ready"]:
            headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
        await send({"type": "http.response.start", "status": 200 if state["ready"] else 503, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(state).encode()})


def _end_server() -> None:
    # BentoML's supervisor would restart this worker again and again, to fail in the same way. Process 1 is
    # the supervisor in a container only; elsewhere it means that the supervisor is gone.
    if os.getppid() != 1 or "BENTOML_CONTAINERIZED" in os.environ:
        os.kill(os.getppid(), signal.SIGTERM)


async def _live(configuration: settings.Settings, pulse: Pulse) -> None:
    """Keep the service running; when that fails, end the whole server with the reason."""
    try:
        await keep_service(configuration, front, pulse)
    except Exception as error:
        if isinstance(error, BaseModelError):
            log.error("could not run: %s", error)
        else:
            log.error("could not run", exc_info=error)
        front.stop("ended", "the server is ending")
        with suppress(OSError):  # the log has it
            (configuration.data / settings.START_FAILURE).write_text(f"{error or type(error).__name__}")
        _end_server()


@bentoml.service(name="lora-fusion", workers=1, traffic={"timeout": 24 * 3600})
@bentoml.asgi_app(front, path="/")
class LoraFusion:
    """Serve any weighted combination of LoRA adapters, the weights being request data."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    @bentoml.on_startup  # type: ignore[untyped-decorator]  # BentoML's are
    async def start(self) -> None:
        """Have the engine started; until it is, requests are answered 503."""
        if configuration.log_format == "json":
            use_json()
            logging.getLogger("bentoml.access").setLevel(logging.WARNING)  # `RequestLog` says more
        log.disabled = access_log.disabled = (
            False  # BentoML's set-up of logging disables the loggers that existed before it
        )
        log.setLevel(logging.INFO)
        access_log.setLevel(logging.INFO)
        patches.check_effect(running_app.get(None))
        pulse = Pulse(configuration.loop_timeout_s, int(os.environ[PULSE_FD]) if PULSE_FD in os.environ else None)
        self._tasks = [asyncio.create_task(pulse.run()), asyncio.create_task(_live(configuration, pulse))]

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]  # BentoML's are
    async def stop(self) -> None:
        """Stop the engine, also one that is still starting; the server has drained its requests before."""
        front.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        kill_descendants()


edge: Any = LoraFusion  # what BentoML's decorator makes of the class
# The first is the outermost.
edge.add_asgi_middleware(Cors, access=lambda: front.access)
if configuration.log_format == "json":
    edge.add_asgi_middleware(RequestLog)
edge.add_asgi_middleware(Faults)
edge.add_asgi_middleware(Paths)
edge.add_asgi_middleware(Hosts, access=lambda: front.access)
edge.add_asgi_middleware(Origins, access=lambda: front.access)
edge.add_asgi_middleware(RequestIds)
edge.add_asgi_middleware(RequireKey, access=lambda: front.access)
edge.add_asgi_middleware(MediaTypes)
edge.add_asgi_middleware(LimitBodies, settings=configuration)
edge.add_asgi_middleware(
    LimitRequests, exempt=(*BENTOML_PATHS, "/health", "/ping"), max_requests=configuration.max_requests
)
edge.add_asgi_middleware(Readiness)
edge.add_asgi_middleware(draining.CloseConnections, is_draining=lambda: front.draining)
