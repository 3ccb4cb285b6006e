"""The pulse of the worker's event loop: sent by the loop, watched by the process that started the worker.

A frozen interpreter can neither notice that it is frozen nor take SIGTERM, so another process watches and kills. Lines
of a pipe carry the pulse: the worker's process id and how long its loop may stand still from now on.
"""

import asyncio
import faulthandler
import logging
import math
import os
import select
import signal
import threading
from collections.abc import Callable
from contextlib import suppress

import psutil

log = logging.getLogger("fusion")

PULSE_FD = "LORA_FUSION_PULSE_FD"
"""Environment of the worker: the end of the pipe that it writes to."""
BEATS = 4
"""In the time that a loop may stand still."""
START_FACTOR = 10
"""Imports hold the interpreter for longer than anything does later: how much more patience a start gets."""
REPLACE_S = 30.0
"""How long a worker may be dead before the next one is started: many times longer than that takes."""
TICK_S = 0.5
PIPE_BYTES = 2**20
"""The most that a pipe holds."""


class Pulse:
    """The sending side, on the loop that is watched."""

    def __init__(self, limit_s: float, fd: int | None) -> None:
        self._limit_s = limit_s
        self._fd = fd
        self._factor = START_FACTOR
        if fd is not None:
            os.set_blocking(fd, False)

    async def run(self) -> None:
        """Send beats until cancelled; then the loop is not watched any more."""
        try:
            while True:
                self._beat(self._limit_s * self._factor)
                await asyncio.sleep(self._limit_s / BEATS)
        finally:
            self._beat(math.inf)

    def expect(self, *, starting: bool) -> None:
        """How long the loop may stand still from now on: the limit, or more while something starts."""
        self._factor = START_FACTOR if starting else 1
        self._beat(self._limit_s * self._factor)

    def _beat(self, limit_s: float) -> None:
        if math.isfinite(limit_s):
            faulthandler.dump_traceback_later(limit_s)  # from a thread that needs no interpreter
        else:
            faulthandler.cancel_dump_traceback_later()
        if self._fd is not None:
            with suppress(BlockingIOError, BrokenPipeError):
                _write(self._fd, os.getpid(), limit_s)


def _write(fd: int, pid: int, limit_s: float) -> None:
    # A stall is noticed up to one beat early, which must not shorten the limit.
    os.write(fd, f"{pid} {limit_s * (1 + 1 / BEATS):g}\n".encode())


class Watch:
    """Kills the worker when its pulse is late, and calls `at_loss` when a dead one is not replaced within `REPLACE_S`.

    `at_ready` is called at each beat of a worker that has started: one that may stand still for `limit_s` at most.
    Both are called from the watch's thread. Time counts only while this process runs too, so that a machine or a
    container may be paused.
    """

    def __init__(self, limit_s: float, at_ready: Callable[[], None], at_loss: Callable[[], None]) -> None:
        self._limit_s = limit_s
        self._at_ready = at_ready
        self._at_loss = at_loss
        self._reading, self.fd = os.pipe()
        """The second is the worker's end, which it inherits."""
        os.set_inheritable(self.fd, True)
        threading.Thread(target=self._run, name="watch-pulse", daemon=True).start()

    def begin(self, pid: int) -> None:
        """Watch the child `pid` from now on, as one that is starting."""
        _write(self.fd, pid, self._limit_s * START_FACTOR)

    def _run(self) -> None:
        pid, left_s, dead_s = 0, math.inf, 0.0
        while True:
            if select.select([self._reading], [], [], TICK_S)[0]:
                try:
                    number, limit = os.read(self._reading, PIPE_BYTES).split(b"\n")[-2].split()
                    pid, left_s, dead_s = int(number), float(limit), 0.0
                except (ValueError, IndexError):  # not a beat
                    continue
                if left_s <= 2 * self._limit_s:
                    self._at_ready()
            elif pid and not _is_child(pid):
                dead_s += TICK_S
                if dead_s >= REPLACE_S:
                    self._at_loss()
            elif (left_s := left_s - TICK_S) <= 0:
                left_s = math.inf
                log.error("the event loop of worker %d stands still; the worker is killed and started afresh", pid)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _is_child(pid: int) -> bool:
    """Whether `pid` is a child of this process that runs: not even a zombie is left to be taken for another process."""
    try:
        child = psutil.Process(pid)
        return bool(child.ppid() == os.getpid() and child.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
