"""The service class that `bentoml serve service.bento.app:LoraFusion` loads: one worker, vLLM's API in its process."""

import asyncio
import json
import logging
import os
import signal
from contextlib import AsyncExitStack
from contextvars import ContextVar
from typing import TYPE_CHECKING

import bentoml
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from service import settings
from service.bento import patches
from service.front import Front
from service.process import end_with_parent

if TYPE_CHECKING:  # vLLM takes seconds to import; the supervisor, which only imports this file, needs none of it
    from service.engine.server import Engine

log = logging.getLogger("fusion")

SHUTDOWN_GRACE_S = 10
"""Grace period for in-flight responses once the engine has died."""

front = Front()
patches.install(front.metric_path)
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
        if scope["type"] != "http" or scope["path"] != "/readyz":
            await self.app(scope, receive, send)
            return
        state = front.readiness()
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200 if state["ready"] else 503, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(state).encode()})


def _end_server() -> None:
    # BentoML's supervisor would restart this worker again and again, to fail in the same way. Process 1 is
    # the supervisor in a container only; elsewhere it means that the supervisor is gone.
    if os.getppid() != 1 or "BENTOML_CONTAINERIZED" in os.environ:
        os.kill(os.getppid(), signal.SIGTERM)


async def _exit_with_engine(engine: "Engine") -> None:
    """End this worker once its engine has died; the supervisor then starts a fresh one."""
    while engine.alive:
        await asyncio.sleep(1)
    log.error("the engine has died; this worker exits and is restarted")
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(SHUTDOWN_GRACE_S)
    os._exit(1)  # what still waits for that engine would keep it forever


@bentoml.service(name="lora-fusion", workers=1, traffic={"timeout": 24 * 3600, "max_concurrency": 4096})
@bentoml.asgi_app(front, path="/")
class LoraFusion:
    """Serve any weighted combination of LoRA adapters, the weights being request data."""

    def __init__(self) -> None:
        self._opened = AsyncExitStack()
        self._engine: Engine | None = None

    @bentoml.on_startup  # type: ignore[untyped-decorator]  # BentoML's are
    async def start(self) -> None:
        """Start the engine; a failure ends the whole server with its reason."""
        from service.startup import open_service

        end_with_parent()
        log.disabled = False  # BentoML's set-up of logging disables the loggers that existed before it
        log.setLevel(logging.INFO)
        configuration = settings.read_settings()
        try:
            patches.check_effect(running_app.get(None))
            service = await self._opened.enter_async_context(open_service(configuration))
            front.start(service)
        except BaseException as error:
            log.error("could not start", exc_info=error)
            (configuration.data / settings.START_FAILURE).write_text(f"{error or type(error).__name__}")
            await self.stop()
            _end_server()
            raise
        self._engine = service.engine
        self._opened.callback(asyncio.create_task(_exit_with_engine(service.engine)).cancel)
        log.info("ready")

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]  # BentoML's are
    async def stop(self) -> None:
        """Stop the engine; the server has drained its requests before."""
        front.stop()
        await self._opened.aclose()

    async def __is_alive__(self) -> bool:
        return self._engine is None or self._engine.alive


LoraFusion.add_asgi_middleware(Readiness)  # type: ignore[attr-defined]  # from BentoML's decorator
