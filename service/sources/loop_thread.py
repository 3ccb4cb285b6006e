"""A thread with an event loop, for what moves many bytes."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
CLOSE_S = 5.0


class LoopThread:
    """An event loop in a thread of its own: what arrives there by the megabyte delays no answer."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._serve, name="fusion-fetches", daemon=True).start()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns; it is canceled with the caller."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def close(self) -> None:
        """End what runs in it, and the thread."""
        ending = asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop)
        await asyncio.wait([asyncio.wrap_future(ending)], timeout=CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _serve(self) -> None:
        self._loop.run_forever()
        self._loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
