"""The files of stacks and builds: written once in threads, and the first to go when the disk is full."""

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from adapters import Store
from adapters.files import is_whole
from service.errors import ApiError
from service.leases import Leases
from service.shared_store import SharedStoreError
from service.threads import Threads

T = TypeVar("T")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
MAX_ATTEMPTS = 16
"""Enough to remove a store of tens of thousands; by then others fill the disk as fast."""
log = logging.getLogger("fusion")


class BuildFiles:
    """The store of stacks and builds, for the event loop."""

    def __init__(self, store: Store, threads: Threads, leases: Leases | None = None) -> None:
        self.in_use: Callable[[], set[str]] = set
        """The keys that must stay, set by what uses them, as is the next."""
        self.evict_idle: Callable[[], bool] = lambda: False
        """Stop using an entry, least recently used first; False when all are needed."""
        self._store = store
        self._threads = threads
        self._leases = leases
        self._lock = asyncio.Lock()
        """Held while files are looked up or removed: what was found must not be deleted before it is loaded."""

    async def find(self, key: str) -> Path | None:
        """The entry `key`, which the caller has in use, or None; one whose files have changed is deleted."""
        async with self._lock:
            path = await self._threads.files.run(self._store.get, key)
        if path is None and self._leases is not None:  # perhaps where replicas share
            path = await self._fetch(key)
        if path is None or await self._threads.files.run(is_whole, path):
            return path
        log.error("the stored files of %s are damaged: they are made again", key[:12])
        async with self._lock:
            await self._threads.files.run(self._store.remove, key)
        return None

    async def _fetch(self, key: str) -> Path | None:
        try:
            return await self.retry_when_full(lambda: self._threads.builds.run(self._store.fetch, key))
        except SharedStoreError as error:  # it is made here
            log.warning("%s is not looked up where replicas share: %s", key[:12], error)
            return None

    @asynccontextmanager
    async def turn(self, key: str) -> AsyncIterator[Path | None]:
        """Wait until no other replica makes `key`, for the block; yields its files when another has made them."""
        if self._leases is None:
            yield None
        else:
            async with self._leases.hold(key, lambda: self.find(key)) as path:
                yield path

    async def land(self, key: str, write: Callable[[Path], None]) -> Path:
        """Let `write` fill the entry `key`, and remove old ones that are over the store's budget.

        Raises what `write` does; OSError when the disk is full of what is in use.
        """
        path = await self.retry_when_full(lambda: self._threads.builds.run(self._store.land, key, write))
        try:
            await self._threads.builds.run(self._store.publish, key)
            async with self._lock:
                await self._threads.files.run(self._store.evict, self.in_use())
        except (ApiError, OSError) as error:  # a busy server's; the next build evicts
            log.warning("a stack or build was not shared, or old ones were not evicted: %s", error)
        return path

    async def remove(self, key: str) -> None:
        """Delete the entry `key`, unless it is in use."""
        async with self._lock:
            if key not in self.in_use():
                await self._threads.files.run(self._store.remove, key)

    async def read(self, file: Path) -> str:
        """The text of a file of an entry."""
        return await self._threads.files.run(file.read_text)

    async def retry_when_full(self, call: Callable[[], Awaitable[T]]) -> T:
        """What `call` returns; when the disk is full, old stacks and builds are removed and it is called again.

        Least recently used first, twice as many each time, and at last those that are only idle in the engine; the
        OSError passes through when none is left to remove.
        """
        for attempt in range(MAX_ATTEMPTS):
            try:
                return await call()
            except OSError as error:
                if error.errno not in NO_SPACE or not (removed := await self._remove_oldest(2**attempt)):
                    raise
                log.warning("the disk is full: removed %d old stacks and builds", removed)
        return await call()

    async def _remove_oldest(self, count: int) -> int:
        async with self._lock:
            removed = await self._threads.files.run(self._store.remove_oldest, self.in_use(), count)
            if not removed and self.evict_idle():
                removed = await self._threads.files.run(self._store.remove_oldest, self.in_use(), count)
            return len(removed)
