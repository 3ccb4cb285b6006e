"""The only file that imports BentoML: one worker, vLLM's API layer in its process."""

import json
import logging
from typing import Any

import bentoml
from starlette.routing import Match, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from service import settings
from service.errors import ApiError, error_response
from service.fusion_service import FusionService
from service.routes import adapters, fusions, models

log = logging.getLogger("fusion")


class Front:
    """Routes of our own first, then the gate and vLLM's app; 503 until the engine is up."""

    def __init__(self) -> None:
        self._service: FusionService | None = None
        self._own = Router()

    def open(self, service: FusionService) -> None:
        """Start answering for `service`."""
        self._own = Router([*adapters.routes(service), *fusions.routes(service), *models.routes(service)])
        self._service = service

    def shut(self) -> None:
        """Answer 503 from now on."""
        self._service = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        service = self._service
        if service is None:
            await error_response(ApiError(503, "The engine is starting or stopping."))(scope, receive, send)
            return
        scope["root_path"] = ""
        for route in self._own.routes:
            if route.matches(scope)[0] is not Match.NONE:
                await self._own(scope, receive, send)
                return
        await service.gate(scope, receive, send)


front = Front()


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
        ready = service is not None and service.ready and service.engine.alive
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


@bentoml.service(name="lora-fusion", workers=1, traffic={"timeout": 24 * 3600, "max_concurrency": 4096})
@bentoml.asgi_app(front, path="/")
class LoraFusion:
    """Start and stop with the Bento worker."""

    service: FusionService

    @bentoml.on_startup
    async def start(self) -> None:
        """Start the engine; a failure ends the server with its reason."""
        self.service = FusionService(settings.read())
        try:
            await self.service.start()
        except BaseException:
            await self.service.close()
            raise
        self._lifespan = self.service.engine.app.router.lifespan_context(self.service.engine.app)
        await self._lifespan.__aenter__()
        front.open(self.service)
        log.info("ready")

    @bentoml.on_shutdown
    async def stop(self) -> None:
        """Requests are drained by the server before this."""
        front.shut()
        if hasattr(self, "_lifespan"):
            await self._lifespan.__aexit__(None, None, None)
        await self.service.close()

    async def __is_alive__(self) -> bool:
        return not hasattr(self.service, "engine") or self.service.engine.alive


LoraFusion.add_asgi_middleware(Health)
