"""Threads for blocking calls, one pool for each kind of call: a kind that stalls stops no other."""

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ParamSpec, Self, TypeVar

from service.errors import ApiError

P = ParamSpec("P")
T = TypeVar("T")
CALL_TIMEOUT_S = 3600.0
"""How long one build, plan, export or upload may take; nobody waits longer for a thread that hangs."""


class ThreadPool:
    """At most `threads` calls at once and `waiting` more in a queue.

    A caller gives up when its call has not begun after `queue_s`, or not ended after `timeout_s`. A call that nobody
    waits for any more never begins; one that has begun runs to its end and keeps its thread until then, so it needs
    a bound of its own.
    """

    def __init__(
        self,
        kind: str,
        *,
        threads: int,
        waiting: int,
        timeout_s: float | None = None,
        queue_s: float | None = None,
    ) -> None:
        self._kind = kind
        self._limit = threads + waiting
        self._timeout_s = timeout_s
        self._queue_s = queue_s
        self._calls = 0
        self._executor = ThreadPoolExecutor(threads, f"fusion-{kind}")

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `call` in one of the threads; `ApiError` 503 when the queue is full or the time is over."""
        if self._calls >= self._limit:
            raise ApiError(503, f"Too many {self._kind} are queued; try again.")
        loop = asyncio.get_running_loop()
        try:
            submitted = self._executor.submit(partial(call, *args, **kwargs))
        except RuntimeError:
            raise refuse_call() from None
        self._calls += 1
        submitted.add_done_callback(partial(self._end_call, loop))
        result = asyncio.wrap_future(submitted)
        result.add_done_callback(_retrieve_exception)
        try:
            return await self._wait(submitted, result)
        finally:
            submitted.cancel()  # nothing happens to a call that has begun

    def start(self, call: Callable[[], object]) -> None:
        """Have `call` run some time; it is never refused, and nobody waits for it."""
        with contextlib.suppress(RuntimeError):  # the server has stopped
            self._executor.submit(call)

    async def _wait(self, submitted: Future[T], result: asyncio.Future[T]) -> T:
        queue_s, rest_s = self._queue_s, self._timeout_s
        if queue_s is not None:
            await asyncio.wait([result], timeout=queue_s)
            if not submitted.cancelled() and submitted.cancel():
                message = f"No thread was free for {self._kind} within {queue_s:g} s; try again."
                raise ApiError(503, message)
            rest_s = None if rest_s is None else max(0.0, rest_s - queue_s)
        await asyncio.wait([result], timeout=rest_s)
        if not result.done():
            message = f"The {self._kind} took longer than {self._timeout_s:g} s; try again."
            raise ApiError(503, message)
        if submitted.cancelled():
            raise refuse_call()
        return result.result()

    def _end_call(self, loop: asyncio.AbstractEventLoop, _: object) -> None:
        def end() -> None:
            self._calls -= 1

        with contextlib.suppress(RuntimeError):  # the server has stopped
            loop.call_soon_threadsafe(end)

    def close(self) -> None:
        """Start no further call; those that run are not waited for."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def refuse_call() -> ApiError:
    """What to raise for a call that nothing runs any more."""
    return ApiError(503, "The server is stopping, or its engine is being replaced; try again.")


def _retrieve_exception(result: asyncio.Future[Any]) -> None:
    if not result.cancelled():
        result.exception()  # asyncio would log it when its caller has gone


@dataclass(frozen=True, slots=True)
class Threads:
    """The pools of one server, by what they do."""

    files: ThreadPool
    """Short calls: look-ups, reports, deletions, the next part of an export."""
    adapters: ThreadPool
    """Reading and storing what is registered."""
    functions: ThreadPool
    """The weights of requests that are functions."""
    builds: ThreadPool
    """These and the next two wait for a process that computes (see `processes`)."""
    plans: ThreadPool
    exports: ThreadPool

    @classmethod
    def start(cls, *, waiting: int, wait_timeout_s: float) -> Self:
        """Pools in which up to `waiting` calls of a kind wait; all but builds, which requests wait for together,
        give up after `wait_timeout_s` in the queue.
        """
        cores = len(os.sched_getaffinity(0))

        def pool(kind: str, threads: int, *, queue_s: float | None = wait_timeout_s) -> ThreadPool:
            return ThreadPool(kind, threads=threads, waiting=waiting, timeout_s=CALL_TIMEOUT_S, queue_s=queue_s)

        return cls(
            files=pool("files", 4),
            adapters=pool("registrations of adapters", 2),
            functions=pool("functions", 2),
            builds=pool("builds", min(4, cores), queue_s=None),
            plans=pool("plans", 2),
            exports=pool("exports", 2),
        )

    def close(self) -> None:
        """Close all pools."""
        for field in fields(self):
            getattr(self, field.name).close()
