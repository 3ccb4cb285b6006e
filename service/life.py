"""The service's life in its worker: started, replaced when its engine dies, ended when that does not help.

The worker and its socket outlive an engine, and so do data folder, registry and metrics: while an engine starts,
requests are answered 503 at once.
"""

import asyncio
import importlib
import logging
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from service.front import Front
from service.pulse import Pulse
from service.settings import Settings

if TYPE_CHECKING:
    from service.fusion_service import FusionService

log = logging.getLogger("fusion")

MAX_DEATHS = 3
"""Deaths of engines in a row that end the service."""
HEALTHY_S = 300.0
"""An engine that lives for this long ends the row."""
POLL_S = 0.2
PAUSE_S = 1.0
"""Before an engine is started again; twice as long after each further death in a row."""


class EngineLostError(RuntimeError):
    """An engine died once too often; says why."""


async def keep_service(settings: Settings, front: Front, pulse: Pulse) -> None:
    """Have `front` answer for a service until cancelled.

    Raises what the first start raises, and `EngineLostError` when engines died `MAX_DEATHS` times in a row.
    """
    # vLLM takes seconds to import; meanwhile the loop answers 503.
    startup = await asyncio.to_thread(importlib.import_module, "service.startup")
    async with AsyncExitStack() as stack:
        registry = await asyncio.to_thread(stack.enter_context, startup.open_registry(settings))
        metrics = startup.Metrics()
        metrics.ready.set_function(lambda: front.readiness()["ready"])
        row, ready_at = 0, 0.0
        while True:
            reason = ""
            try:
                async with startup.open_service(settings, registry, metrics) as service:
                    ready_at = time.monotonic()
                    await _answer(service, front, pulse)
                    reason = service.engine.death()
                    row = 0 if time.monotonic() - ready_at > HEALTHY_S else row
            except Exception as error:
                if not ready_at:
                    raise
                log.exception("the engine did not start again" if not reason else "the dead engine was not closed")
                reason = reason or str(error) or type(error).__name__
            row += 1
            log.error("the engine died: %s", reason)
            if row == MAX_DEATHS:
                raise EngineLostError(f"the engine died {MAX_DEATHS} times in a row: {reason}")
            front.stop("restarting", f"the engine died; restarting, attempt {row + 1} of {MAX_DEATHS}")
            await asyncio.sleep(PAUSE_S * 2 ** (row - 1))


async def _answer(service: "FusionService", front: Front, pulse: Pulse) -> None:
    """Let `front` answer for `service` until its engine dies."""
    front.start(service)
    pulse.expect(starting=False)
    log.info("ready")
    while service.engine.alive:
        await asyncio.sleep(POLL_S)
    pulse.expect(starting=True)
