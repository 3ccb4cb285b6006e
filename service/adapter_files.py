"""The files of registered adapters: landed once, held while something reads them, deleted when nothing needs them."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import TypeVar

from adapters import LoraAdapter
from service.build_files import BuildFiles
from service.errors import ApiError
from service.materializer import Materializer
from service.registry import Registry
from service.threads import Threads
from service.waits import enter, finish

T = TypeVar("T")
CHECK_SHARE = 0.1
"""Of the time after a start that reading stored adapters may take."""
log = logging.getLogger("fusion")


class AdapterFiles:
    """Keeps the files of every adapter that is needed, as `is_needed` says of its digest, or held."""

    def __init__(
        self,
        materializer: Materializer,
        builds: BuildFiles,
        threads: Threads,
        is_needed: Callable[[str], bool],
        *,
        timeout_s: float,
    ) -> None:
        self._materializer = materializer
        self.retry_when_full = builds.retry_when_full
        self._threads = threads
        self._is_needed = is_needed
        self._timeout_s = timeout_s
        self._held: Counter[str] = Counter()
        self._changing = asyncio.Lock()
        """Held while files appear or go: what is to be deleted must not be found by who adds the same adapter."""

    @asynccontextmanager
    async def hold(self, digests: Collection[str]) -> AsyncIterator[None]:
        """Keep the files of these adapters for the block; those that nothing needs then are deleted."""
        self._held.update(digests)
        try:
            yield
        finally:
            self._held.subtract(digests)
            self._held += Counter()  # drops the zeros
            await self.delete_unneeded(digests)

    async def read(self, read: Callable[[], T]) -> T:
        """What `read` returns, in a thread; old builds make room for what it writes on a full disk."""
        return await self.retry_when_full(lambda: self._threads.adapters.run(read))

    async def measure(self, adapter: LoraAdapter, *, max_weight: float) -> float:
        """The norm of an adapter's update; AdapterError when it overflows the served dtype at `max_weight`."""
        return await self._threads.adapters.run(self._materializer.headroom.check, adapter, max_weight=max_weight)

    async def add(self, adapter: LoraAdapter) -> None:
        """Store the files of an adapter that the caller holds; old builds make room on a full disk.

        `ApiError` 503 when others take too long; OSError when the disk is full of what is in use.
        """
        await finish(self._add(adapter))

    async def publish(self, digest: str) -> None:
        """Show an adapter's files to the other replicas, where they do not have them yet."""
        await self._threads.files.run(self._materializer.sources.publish, digest)

    async def delete_unneeded(self, digests: Collection[str]) -> None:
        """Delete the files of those of these adapters that nothing needs and nobody holds."""
        if any(map(self._is_unneeded, digests)):
            await finish(self._delete(digests))

    async def check(self, registry: Registry) -> None:
        """Read the files of all registered adapters once, so that damage shows before they are asked for, and measure
        the norms that their records do not have.

        One after the other, and at most CHECK_SHARE of the time.
        """
        for digest in list(registry.ranks):
            started = time.monotonic()
            if self._is_needed(digest):
                async with self.hold([digest]):
                    try:
                        norm = await self._threads.adapters.run(self._materializer.measure, digest)
                        if not registry.snapshot.norms.get(digest, norm):
                            registry.snapshot.norms[digest] = norm
                    except (ApiError, OSError) as error:  # damaged, or the server is busy; they are checked when used
                        log.warning("files of an adapter were not checked: %s", error)
                if digest in self._materializer.damage:
                    log.error("the files of adapter %s are damaged: %s", digest[:12], self._materializer.damage[digest])
            await asyncio.sleep((time.monotonic() - started) * (1 / CHECK_SHARE - 1))

    async def _add(self, adapter: LoraAdapter) -> None:
        add, run = self._materializer.add, self._threads.adapters.run
        async with enter(self._changing, self._timeout_s, "other adapters to be stored"):
            await self.retry_when_full(lambda: run(add, adapter))

    async def _delete(self, digests: Collection[str]) -> None:
        try:
            async with enter(self._changing, self._timeout_s, "other adapters to be stored"):
                for digest in filter(self._is_unneeded, digests):
                    await self._threads.files.run(self._materializer.remove, digest)
        except Exception as error:  # nobody waits for these files to go
            log.warning("files of removed adapters were left behind: %s", error)

    def _is_unneeded(self, digest: str) -> bool:
        return digest not in self._held and not self._is_needed(digest)
