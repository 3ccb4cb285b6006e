"""What BentoML's supervising process does for its worker beyond starting it: bounds on its end, and a watch over it.

BentoML waits a day for a worker that does not stop, starts one that dies for ever, and notices none that is frozen. It
looks for dead workers by the time of day: when the clock is set back, it stops looking for as long.
"""

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import bentoml.serving
import circus.process
from bentoml._internal.utils import circus as arbiters
from tornado.ioloop import IOLoop

from service.bento.patches import require
from service.process import end_with_parent
from service.pulse import PULSE_FD, REPLACE_S, Watch
from service.settings import START_FAILURE, Settings, read_settings

log = logging.getLogger("fusion")

MAX_STARTS = 3
"""Starts in a row that do not lead to a ready worker."""
CHECK_S = 2.0
"""How often the supervisor looks whether its worker runs; BentoML's 10 s would be spent before each new worker."""
CLOSE_S = 10.0
"""Of FUSION_STOP_TIMEOUT_S, at most half: for closing the engine, after the requests in flight."""


def install() -> None:
    """Replace how BentoML starts workers; the process that is a worker itself starts none."""
    create = require(bentoml.serving, "create_watcher", "name", "args", "cmd", "use_sockets", "kwargs")
    bentoml.serving.create_watcher = _bounded(create)
    arbiters.create_standalone_arbiter = partial(
        require(arbiters, "create_standalone_arbiter", "watchers", "threaded", "kwargs"), check_delay=CHECK_S
    )
    require(IOLoop, "time", "self")
    IOLoop.time = _read_clock  # type: ignore[method-assign]  # what its timers count by
    popen = require(circus.process, "Popen", "args", "kwargs")
    circus.process.Popen = _ending_with_parent(popen)


def _read_clock(self: IOLoop) -> float:
    return time.monotonic()


def _ending_with_parent(popen: Callable[..., Any]) -> Callable[..., Any]:
    """`popen`, whose processes the kernel kills with this one, from their first moment on."""

    def start(*args: Any, preexec_fn: Callable[[], None] | None = None, **options: Any) -> Any:
        parent = os.getpid()

        def prepare() -> None:
            if preexec_fn is not None:
                preexec_fn()
            end_with_parent(parent)

        return popen(*args, preexec_fn=prepare, **options)

    return start


class StartLimit:
    """Counts the starts of a worker, and allows `MAX_STARTS` in a row that do not make it ready."""

    def __init__(self, settings: Settings) -> None:
        self._failure = settings.data / START_FAILURE
        self._starts = 0

    def reset(self) -> None:
        """A worker is ready."""
        self._starts = 0

    def allow(self, **_: Any) -> bool:
        """Whether to start a worker now: circus' hook `before_spawn`; False ends the server, with the reason."""
        if self._failure.exists():
            return False  # the worker has said why it could not start
        self._starts += 1
        if self._starts > MAX_STARTS:
            self._failure.write_text(f"the worker died {MAX_STARTS} times before it was ready; its log is above")
            return False
        return True

    def give_up(self) -> None:
        """End the server at once, since a dead worker was not replaced; the kernel kills what it has started."""
        reason = f"the worker died, and no other was started within {REPLACE_S:g} s"
        log.error("%s", reason)
        try:
            if not self._failure.exists():
                self._failure.write_text(reason)
        finally:
            os._exit(1)


def _bounded(create: Callable[..., Any]) -> Callable[..., Any]:
    """BentoML's `create_watcher`, of watchers that stop and watch their worker within the settings' bounds."""

    def create_bounded(name: str, args: list[str], **options: Any) -> Any:
        settings = read_settings()
        stop_s = settings.stop_timeout_s
        if "--timeout-graceful-shutdown" not in args:
            args = [*args, "--timeout-graceful-shutdown", str(max(1, round(max(stop_s / 2, stop_s - CLOSE_S))))]
        watcher = create(name=name, args=args, **options)
        for attribute in ("graceful_timeout", "stop_children", "hooks"):
            require(watcher, attribute)
        limit = StartLimit(settings)
        watcher.graceful_timeout = settings.drain_s + stop_s
        watcher.stop_children = False  # the engine must not stop before the worker has answered its requests
        watch = Watch(settings.loop_timeout_s, limit.reset, limit.give_up)

        def begin(*, pid: int, **_: Any) -> bool:
            watch.begin(pid)
            return True

        watcher.hooks |= {"before_spawn": limit.allow, "after_spawn": begin}
        watcher.env[PULSE_FD] = str(watch.fd)
        return watcher

    return create_bounded
