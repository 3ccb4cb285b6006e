"""Making what requests wait for: once per key, however many wait, and no longer than one of them does."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from service.errors import ApiError
from service.metrics import Metrics
from service.placement import Kind

T = TypeVar("T")
Stage = Literal["queued", "fusing", "in line", "loading"]
"""Waiting for a thread, being written, waiting for a place in the engine, being loaded."""


@dataclass(frozen=True, slots=True)
class Making:
    """How to make a stack or build: `write` fills a store entry (the adapter folder and the report) in a thread, and
    `hold` keeps what it reads.
    """

    key: str
    kind: Kind
    write: Callable[[Path], None]
    hold: Callable[[], AbstractAsyncContextManager[None]] = nullcontext


@dataclass(slots=True, eq=False)
class Attempt(Generic[T]):
    """A making under way, and the requests that wait for it."""

    making: Making
    stage: Stage = "queued"
    is_new: bool = False
    """Whether its files were written now."""
    waiters: set[asyncio.Future[T]] = field(default_factory=set)
    task: asyncio.Task[T | None] | None = None
    began: float = field(default_factory=time.monotonic)


class Attempts(Generic[T]):
    """The attempts under way, by key. All methods run on the event loop.

    `make` returns None when nobody waits for the attempt any more. `deliver` gets its outcome before those who wait do:
    the result, or None and the error, and how many they are. `give_back` takes a result that its waiter cannot take.
    """

    def __init__(
        self,
        make: Callable[[Attempt[T]], Coroutine[Any, Any, T | None]],
        deliver: Callable[[str, T | None, BaseException | None, int], None],
        give_back: Callable[[T], None],
        metrics: Metrics,
        *,
        max_waiting: int,
        timeout_s: float,
    ) -> None:
        self._make = make
        self._deliver = deliver
        self._give_back = give_back
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._timeout_s = timeout_s
        self._waiting = 0
        self._attempts: dict[str, Attempt[T]] = {}

    @property
    def stages(self) -> dict[str, Stage]:
        """How far each attempt is, by key."""
        return {key: attempt.stage for key, attempt in list(self._attempts.items())}

    @property
    def under_way(self) -> list[Attempt[T]]:
        """The attempts themselves, oldest first."""
        return list(self._attempts.values())

    async def wait(self, making: Making, *, timeout_s: float | None = None) -> tuple[T, bool]:
        """The result of the attempt under way, or of a new one, and whether files were written for it.

        Raises whatever `make` raised; `ApiError` 503 when too many requests wait, or no result arrives within
        `timeout_s` seconds (None: the limit for requests).
        """
        timeout_s = timeout_s or self._timeout_s
        self.check_room()
        attempt = self._attempts.get(making.key) or self._start(making)
        waiter: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        attempt.waiters.add(waiter)
        self._count_waiting(1)
        try:
            await asyncio.wait([waiter], timeout=timeout_s)
        except asyncio.CancelledError:
            if waiter.done() and waiter.exception() is None:
                self._give_back(waiter.result())
            raise
        finally:
            self._count_waiting(-1)
            self._leave(attempt, waiter)
        if waiter.cancelled():
            self._metrics.record_refusal("timeout")
            raise ApiError(503, _describe_timeout(attempt.stage, timeout_s))
        return waiter.result(), attempt.is_new

    def check_room(self) -> None:
        """Raise `ApiError` 503 when no further request may wait."""
        if self._waiting >= self._max_waiting:
            self._metrics.record_refusal("queue")
            message = f"{self._waiting} requests wait for stacks and builds, the limit (FUSION_MAX_WAITING); try again."
            raise ApiError(503, message)

    def drop(self, attempt: Attempt[T]) -> None:
        """Let the next request for this key start afresh."""
        if self._attempts.get(attempt.making.key) is attempt:
            del self._attempts[attempt.making.key]

    def _start(self, making: Making) -> Attempt[T]:
        attempt: Attempt[T] = Attempt(making)
        attempt.task = asyncio.create_task(self._make(attempt))
        attempt.task.add_done_callback(lambda task: self._end(attempt, task))
        self._attempts[making.key] = attempt
        return attempt

    def _leave(self, attempt: Attempt[T], waiter: asyncio.Future[T]) -> None:
        """Take a request off an attempt, which ends with its last one unless it is at work."""
        waiter.cancel()  # nothing happens when it has its answer
        attempt.waiters.discard(waiter)
        assert attempt.task is not None
        if not attempt.waiters and attempt.stage in ("queued", "in line") and not attempt.task.done():
            self.drop(attempt)
            attempt.task.cancel()

    def _end(self, attempt: Attempt[T], task: asyncio.Task[T | None]) -> None:
        self.drop(attempt)
        error: BaseException | None
        error = ApiError(503, "The server is stopping.") if task.cancelled() else task.exception()
        result = None if error is not None else task.result()
        waiters = [waiter for waiter in attempt.waiters if not waiter.done()]
        self._deliver(attempt.making.key, result, error, len(waiters))
        for waiter in waiters:
            if result is None:
                assert error is not None  # it had somebody who waited
                waiter.set_exception(error)
            else:
                waiter.set_result(result)

    def _count_waiting(self, change: int) -> None:
        self._waiting += change
        self._metrics.waiting.set(self._waiting)


def _describe_timeout(stage: Stage, timeout_s: float) -> str:
    match stage:
        case "in line":
            why = "all places of the engine were in use; try again later."
        case "queued":
            why = "other fusions are being made before it; try again later."
        case _:
            why = "it is still being made; ask for it again."
    return f"This fusion was not ready within {timeout_s:g} s: {why}"
