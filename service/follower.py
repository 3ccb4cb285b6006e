"""The snapshot in memory, which follows its database: changed with it, and read again when others have changed that.

Writes go to the database first and then to the snapshot that requests read, so a request costs no query. When a write
fails without an answer, nobody knows whether it was committed: the connection is closed, the snapshot stays as it was,
and `settle` reads all tables again once the database has ended the old session, before anything else is written.
Replicas change the tables in turn, and notice each other's changes by notifications and, where these fail, by asking.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection

from service.audit import Entry, append_entry, current_actor
from service.audit_file import AuditFile
from service.database import FAILURES, LOCK_WAIT_S, Database, ExpiredError, OwnedError
from service.errors import ApiError
from service.migrations import NewerSchemaError
from service.notifications import hear_changes
from service.records import now
from service.snapshot import Snapshot, read_snapshot
from service.threads import ThreadPool
from service.waits import finish

T = TypeVar("T")
MAX_WAITING = 64
"""Calls that wait for the database."""
WATCH_S = 10.0
"""How often the connection is looked at."""
POLL_S = 1.0
"""How often a replica looks for changes of others that it has not heard of."""
TURN_POLL_S = 0.02
_SERVED = "what it said last is served, and nothing can be changed until it answers; try again."

log = logging.getLogger("fusion")


@dataclass(frozen=True, slots=True)
class Outage:
    """Since when the database does not answer (ISO 8601), and how."""

    since: str
    reason: str


class Follower:
    """A snapshot and its database. Made in a thread; its other methods belong to one event loop."""

    def __init__(self, url: str, *, timeout_s: float, shared: bool = False, folder: Path | None = None) -> None:
        """Read the registry at `url`, `shared` with replicas; no call to its database takes over `timeout_s` (seconds).
        The audit's file is in `folder`.

        RuntimeError when another server has it, a newer version has migrated it, or it cannot be read.
        """
        self._timeout_s = timeout_s
        self._database = Database(url, timeout_s=timeout_s, shared=shared)
        self._threads = ThreadPool("database calls", threads=1, waiting=MAX_WAITING, timeout_s=timeout_s)
        self._uncertain = False
        """Whether a write has failed for its caller since `settle`."""
        self._busy = threading.Lock()
        """Held while the database's connection is in use."""
        self._changed = asyncio.Event()
        self._audit_file = None if folder is None else AuditFile(folder)
        self.outage: Outage | None = None
        """What is wrong with the database, until it answers again."""
        self.on_change: Callable[[Snapshot, Snapshot], None] = lambda before, after: None
        """Called when the snapshot was read again, with the old and the new one."""
        try:
            self._database.connect(wait_s=LOCK_WAIT_S)
            self.snapshot, self._changes = read_snapshot(self._database)
            self._write_audit_file()
        except OwnedError as error:
            message = f"{error}; stop it, or set FUSION_DATABASE, or set FUSION_STORE to the same place on both"
            raise RuntimeError(message) from error
        except NewerSchemaError as error:
            where = self._database.where
            message = f"the registry in {where!r} belongs to a newer version: {error}; start that version"
            raise RuntimeError(f"{message}, or restore a backup") from error
        except FAILURES as error:
            reason = str(getattr(error, "orig", None) or error).splitlines()[0]
            where = self._database.where
            more = " and its disk, or restore a backup" if where.startswith("sqlite") else ""
            message = f"the registry in {where!r} cannot be read: {reason}; check FUSION_DATABASE{more}"
            raise RuntimeError(message) from error

    @property
    def identity(self) -> str:
        """What tells this registry from others, 32 hex digits."""
        return self._database.identity

    @property
    def shared(self) -> bool:
        """Whether replicas have the registry, too."""
        return self._database.shared

    @property
    def is_current(self) -> bool:
        """Whether the snapshot is what the database holds: false after a failure until `settle`."""
        return self._database.connected and not self._uncertain

    async def settle(self) -> None:
        """Make sure that the snapshot is what the database holds; 503 when it does not answer.

        To be called before the decisions that a write rests on.
        """
        loop = asyncio.get_running_loop()

        def check(_: float) -> None:
            connected = self._database.connected
            if connected and (changes := self._database.count_changes()) is not None:
                if changes == self._changes:
                    return
            else:
                connected = False
                self._database.disconnect()
                self._database.connect()
            snapshot, self._changes = read_snapshot(self._database)
            self._threads.start(self._write_audit_file)
            loop.call_soon_threadsafe(self._replace, snapshot, connected)

        try:
            await self._run(check)  # in the one thread: what was written before is applied, or read again
        except ApiError as error:
            self.outage = self.outage or Outage(now(), error.message)
            raise
        self._uncertain, self.outage = False, None

    @asynccontextmanager
    async def change(self) -> AsyncIterator[None]:
        """Alone among the replicas, with the snapshot being what the database holds; 503 when that takes too long."""
        await self.settle()
        if not self.shared:
            yield
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                while not await self._run(lambda _: self._database.take_turn()):
                    await asyncio.sleep(TURN_POLL_S)
        except TimeoutError:
            message = f"Another replica has been changing the registry for {self._timeout_s:g} s; try again."
            raise ApiError(503, message) from None
        try:
            await self.settle()  # the last one's change
            yield
        finally:
            with suppress(ApiError):  # it is lost with the connection
                await finish(self._run(lambda _: self._database.give_turn()))

    async def watch(self) -> None:
        """Follow the database until cancelled: a lost connection is made anew, and what others change is read."""
        listener = asyncio.create_task(self._listen()) if self.shared else None
        try:
            while True:
                began = time.monotonic()
                was_lost = self.outage is not None
                with suppress(ApiError):
                    await self.settle()
                    if was_lost:
                        log.info("the registry's database answers again")
                if self.outage is not None and not was_lost:
                    log.error("%s", self.outage.reason)
                await asyncio.sleep(
                    min(time.monotonic() - began, POLL_S / 4)
                )  # changes may come fast, and reading is work
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S if self.shared else WATCH_S):
                        await self._changed.wait()
                self._changed.clear()
        finally:
            if listener is not None:
                listener.cancel()

    async def _listen(self) -> None:
        await hear_changes(self._database.listen_options(), self._changed.set)

    async def transact(self, call: Callable[[Connection], T]) -> T:
        """What `call` returns, in one transaction that changes nothing that the snapshot has."""

        def run(within_s: float) -> T:
            with self._database.transaction(within_s) as connection:
                return call(connection)

        await self.settle()
        return await self._run(run)

    async def write(
        self, write: Callable[[Connection], T], apply: Callable[[T], None], entry: Callable[[T], Entry | None]
    ) -> T:
        """Run `write` in one transaction and then `apply`, on the event loop, on what it returned. What `entry` makes
        of that goes to the audit in the same transaction, with the `current_actor`; None: nothing has changed.

        Applied even when the caller has left meanwhile: the snapshot follows the database. 403 when the actor's key was
        revoked since the request began: what is under way then changes nothing.
        """
        self.check_actor()
        loop, actor = asyncio.get_running_loop(), current_actor.get()

        def call(within_s: float) -> T:
            with self._database.transaction(within_s) as connection:
                result = write(connection)
                if (change := entry(result)) is not None:
                    append_entry(connection, change, actor)
                changes = self._database.record_change(connection)
            if changes == self._changes + 1:  # else all is read again
                self._changes = changes
            loop.call_soon_threadsafe(apply, result)
            self._threads.start(self._write_audit_file)  # nobody waits for it
            return result

        try:
            return await self._run(call)
        except BaseException:  # the caller has left first, perhaps: it may come true yet
            self._uncertain = True
            raise

    def check_actor(self) -> None:
        """Raise 403 when the key of the `current_actor` has been revoked."""
        if self.snapshot.is_revoked(key := current_actor.get().key):
            raise ApiError(403, f"The API key {key} was revoked meanwhile, so this is not done; ask with another key.")

    async def _run(self, call: Callable[[float], T]) -> T:
        """`call` in the database's thread, given the seconds that are left; ApiError 503 when it fails or is late."""
        deadline = time.monotonic() + self._timeout_s

        def work() -> T:
            if (left := deadline - time.monotonic()) <= 0:
                raise ExpiredError("the call began too late")  # whoever asked has left
            with self._busy:
                return call(left)

        try:
            return await self._threads.run(work)
        except OwnedError as error:
            message = "The registry is in use by another server, or by this server's lost connection; try again."
            raise ApiError(503, message) from error
        except FAILURES as error:
            raise ApiError(503, f"The registry's database failed: {type(error).__name__}; {_SERVED}") from error
        except ApiError as error:  # the threads': too many calls wait, or one does for too long
            if self.outage is None:
                raise
            raise ApiError(503, f"The registry's database does not answer; {_SERVED}") from error

    def _write_audit_file(self) -> None:
        """In the database's thread: bring the audit's file up to date, if there is one."""
        if self._audit_file is not None:
            try:
                with self._busy:
                    self._audit_file.follow(lambda: self._database.transaction(self._timeout_s))
            except (*FAILURES, OSError) as error:  # the next change tries again
                log.error("the audit's file is not up to date: %s", type(error).__name__)

    def _replace(self, snapshot: Snapshot, connected: bool) -> None:
        if not connected:
            log.warning("the registry was read again after its connection was lost")
        for digest, norm in snapshot.norms.items():
            snapshot.norms[digest] = norm or self.snapshot.norms.get(digest, 0.0)  # measured since the start
        before, self.snapshot = self.snapshot, snapshot
        self.on_change(before, snapshot)

    def close(self) -> None:
        """Release the connection; waits for a call that runs, which is interrupted."""
        self._threads.close()
        self._database.interrupt()
        if self._busy.acquire(timeout=self._timeout_s):
            self._database.close()
            self._busy.release()
        if self._audit_file is not None:
            self._audit_file.close()
