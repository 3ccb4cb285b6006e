"""Processes for what computes for long: it takes neither the interpreter's lock nor a core from those being answered.

A thread does not do for that. While the engine has all cores, a thread behind it in line for one keeps Python's lock as
it waits, and with it everything that the server does.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from loky.process_executor import BrokenProcessPool, ProcessPoolExecutor, ShutdownExecutorError

from service.errors import ApiError
from service.process import end_with_parent, return_freed_memory
from service.threads import CALL_TIMEOUT_S, refuse_call

T = TypeVar("T")
NICE = 17
"""A fortieth of a core beside an engine that needs it all, and whatever that leaves. Nicer processes would wait for
tens of seconds where the engine's threads never sleep.
"""
IDLE_S = 60.0
log = logging.getLogger("fusion")


class ProcessPool:
    """`count` processes, started together by the first call, and again by the next one when one has ended."""

    def __init__(self, count: int, *, idle_s: float | None = None) -> None:
        """After `idle_s` without a call the processes end; by default they stay."""
        self._count = count
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._executor: ProcessPoolExecutor | None = self._make_executor()

    def start(self) -> None:
        """Start the processes, so that the first call finds them."""
        if self._executor is not None:
            self._executor.submit(os.getpid)

    def run(self, call: Callable[..., T], *args: Any) -> T:
        """What `call` returns or raises in one of the processes, for which the calling thread waits.

        `ApiError` 503 when a process ends meanwhile, after `CALL_TIMEOUT_S`, and while the server stops.
        """
        try:
            executor, submitted = self._submit(call, *args)
        except BrokenProcessPool:  # since it ended without work; there is another now
            executor, submitted = self._submit(call, *args)
        try:
            result: T = submitted.result(CALL_TIMEOUT_S)
        except ShutdownExecutorError:
            raise refuse_call() from None
        except BrokenProcessPool as error:
            self._replace(executor)
            log.error("a process that computes fusions has ended: %s", error)
            message = "The process that computed this has ended, which happens when memory is short; try again."
            raise ApiError(503, message) from None
        except TimeoutError:
            self._replace(executor)
            raise ApiError(503, f"This took longer than {CALL_TIMEOUT_S:g} s; try again.") from None
        except Exception as error:
            raise error from None  # not from the text of the process's traceback
        return result

    def _submit(self, call: Callable[..., T], *args: Any) -> tuple[ProcessPoolExecutor, "Future[T]"]:
        if (executor := self._executor) is None:
            raise refuse_call()
        try:
            return executor, executor.submit(call, *args)
        except ShutdownExecutorError:
            raise refuse_call() from None
        except BrokenProcessPool:
            self._replace(executor)
            raise

    def close(self) -> None:
        """End the processes, whatever they do."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False, kill_workers=True)

    def _make_executor(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._count, timeout=self._idle_s, initializer=_prepare, initargs=(os.getpid(),))

    def _replace(self, executor: ProcessPoolExecutor) -> None:
        with self._lock:
            if self._executor is executor:
                self._executor = self._make_executor()
        executor.shutdown(wait=False, kill_workers=True)


@dataclass(frozen=True, slots=True)
class Processes:
    """The pools of one server, by what they compute."""

    fusions: ProcessPool
    """Stacks, builds and plans: as many processes as there are pairs of cores, four at most."""
    exports: ProcessPool
    """One process, which is rarely there: the largest exports take minutes."""

    @classmethod
    def start(cls) -> Self:
        """Pools whose first fusion finds a process."""
        fusions = ProcessPool(max(1, min(4, len(os.sched_getaffinity(0)) // 2)))
        fusions.start()
        return cls(fusions, ProcessPool(1, idle_s=IDLE_S))

    def close(self) -> None:
        """Close both."""
        self.fusions.close()
        self.exports.close()


def _prepare(parent: int) -> None:
    """Of a new process: end with its parent and not before, leave the cores to others, return memory."""
    end_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # which a terminal or a supervisor sends to a whole group
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICE)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 4))
    return_freed_memory()
