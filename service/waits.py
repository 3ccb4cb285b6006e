"""Waiting for a lock, with an end, and changes that a client cannot cut in two by going away."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from service.errors import ApiError

T = TypeVar("T")
_running: set[asyncio.Future[Any]] = set()
"""The event loop itself keeps weak references only."""


@asynccontextmanager
async def enter(lock: asyncio.Lock | asyncio.Semaphore, timeout_s: float, what: str) -> AsyncIterator[None]:
    """Hold `lock` for the block; `ApiError` 503 when `what` (as "other changes") keep it for `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            await lock.acquire()
    except TimeoutError:
        message = f"Timed out after {timeout_s:g} s waiting for {what}; try again."
        raise ApiError(503, message) from None
    try:
        yield
    finally:
        lock.release()


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it goes on to its end, with the locks it holds, when the caller is canceled."""
    task = asyncio.ensure_future(work)
    _running.add(task)
    task.add_done_callback(_running.discard)
    return await asyncio.shield(task)
