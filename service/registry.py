"""What the server knows across restarts: adapters, versioned profiles, scorecards.

Writes go to the database first and then to the snapshot in memory that requests read, so a request costs no query. One
server owns a registry. When a write fails without an answer, nobody knows whether it was committed: the connection
is closed, the snapshot stays as it was, and `settle` reads all tables again once the database has ended the old
session, before anything else is written.
"""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sqlalchemy import Connection, bindparam, delete, insert, update
from sqlalchemy.exc import SQLAlchemyError

from service.database import LOCK_WAIT_S, Database, ExpiredError, OwnedError
from service.errors import ApiError
from service.records import AdapterRecord, ProfileVersion
from service.snapshot import ROW_BYTES, Snapshot, read_snapshot
from service.tables import ADAPTERS, NAMELESS, PROFILES, VERSIONS
from service.threads import ThreadPool

T = TypeVar("T")
MAX_WAITING = 64
"""Calls that wait for the database."""
WATCH_S = 10.0
"""How often the connection is looked at."""

log = logging.getLogger("fusion")


class Registry:
    """The tables and their snapshot. Made in a thread; its other methods belong to one event loop."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        """Read the registry at `url`; no call to its database takes over `timeout_s` (seconds).

        RuntimeError when another server has it, or it cannot be read.
        """
        self._timeout_s = timeout_s
        self._database = Database(url, timeout_s=timeout_s)
        self._threads = ThreadPool("database calls", threads=1, waiting=MAX_WAITING, timeout_s=timeout_s)
        self._uncertain = False
        """Whether a write has failed for its caller since `settle`."""
        self._busy = threading.Lock()
        """Held while the database's connection is in use."""
        try:
            self._database.connect(wait_s=LOCK_WAIT_S)
            self.snapshot = read_snapshot(self._database)
        except OwnedError as error:
            raise RuntimeError(f"{error}; stop it or set FUSION_DATABASE") from error
        except (SQLAlchemyError, ExpiredError) as error:
            reason = str(getattr(error, "orig", None) or error).splitlines()[0]
            where = self._database.where
            raise RuntimeError(f"the registry in {where!r} cannot be read: {reason}; check FUSION_DATABASE") from error
        for kind, rows in (
            ("adapter", self.snapshot.damaged_adapters),
            ("profile", self.snapshot.damaged_profiles),
        ):
            for name, reason in rows.items():
                log.error("%s %r is damaged: %s", kind, name, reason)

    @property
    def adapters(self) -> Mapping[str, AdapterRecord]:
        """All adapters by name."""
        return self.snapshot.adapters

    @property
    def ranks(self) -> Mapping[str, int]:
        """Rank of every adapter that has a name or is pinned by a profile version, by digest."""
        return self.snapshot.ranks

    @property
    def profiles(self) -> Mapping[str, ProfileVersion]:
        """The current version of every profile, by name."""
        return self.snapshot.profiles

    @property
    def versions(self) -> Mapping[str, Mapping[int, ProfileVersion]]:
        """All versions that can be read, by name and number."""
        return self.snapshot.versions

    @property
    def is_current(self) -> bool:
        """Whether the snapshot is what the database holds: false after a failure until `settle`."""
        return self._database.connected and not self._uncertain

    def needed_digests(self) -> set[str]:
        """Digests of all adapters that have a name or are pinned by a profile version."""
        return {*self.ranks, *self.snapshot.pins}

    def is_needed(self, digest: str) -> bool:
        """Whether an adapter's files are needed: it has a name, a profile version pins it, or nobody knows yet."""
        return not self.is_current or digest in self.ranks or digest in self.snapshot.pins

    def pinning_profiles(self, digest: str) -> list[str]:
        """Profiles with any version that pins the adapter `digest`, by name."""
        return sorted(self.snapshot.pins.get(digest, ()))

    def describe(self, digest: str) -> str:
        """The first name of an adapter, for messages; the start of its digest when it has none. From any thread."""
        names = [record.name for record in list(self.snapshot.adapters.values()) if record.digest == digest]
        return min(names, default=digest[:12])

    def profiles_that_name(self, name: str) -> list[str]:
        """Profiles with any version whose recipe has the adapter `name` with the content it has now, by name."""
        record, versions = self.adapters.get(name), self.versions
        if record is None:
            return []
        return [
            profile
            for profile in self.pinning_profiles(record.digest)
            if any(version.parents.get(name) == record.digest for version in versions.get(profile, {}).values())
        ]

    def version_numbers(self, name: str) -> set[int]:
        """The numbers that the profile's versions have, those that cannot be read included."""
        return {*self.versions.get(name, ()), *self.snapshot.damaged_versions.get(name, ())}

    def check_room(self, size: int, limit: int) -> None:
        """409 when another row of `size` bytes would not fit `limit` bytes, `FUSION_REGISTRY_BYTES`."""
        if self.snapshot.nbytes + size + ROW_BYTES > limit:
            message = f"The registry is full ({self.snapshot.nbytes} bytes, FUSION_REGISTRY_BYTES={limit})"
            raise ApiError(409, f"{message}; delete profiles or scorecards first.")

    async def settle(self) -> None:
        """Make sure that the snapshot is what the database holds; 503 when it does not answer.

        To be called before the decisions that a write rests on.
        """
        loop = asyncio.get_running_loop()

        def check(_: float) -> None:
            if self._database.connected and self._database.check():
                return
            self._database.disconnect()
            self._database.connect()
            snapshot = read_snapshot(self._database)
            loop.call_soon_threadsafe(self._replace, snapshot)

        await self._run(check)  # in the one thread: what was written before is applied, or read again
        self._uncertain = False

    async def watch(self) -> None:
        """Look after the connection until cancelled: a lost one is made anew, and its lock is taken again."""
        failed = False
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                await self.settle()
            except ApiError as error:
                if not failed:
                    log.error("%s", error.message)
                failed = True
            else:
                if failed:
                    log.info("the registry's database answers again")
                failed = False

    async def add_adapter(self, record: AdapterRecord) -> None:
        """Insert, in place of what has this name; the caller has checked that it may go."""
        nameless = self.snapshot.will_keep(record.name)

        def write(connection: Connection) -> None:
            connection.execute(delete(ADAPTERS).where(ADAPTERS.c.name == record.name))
            if nameless is not None:
                connection.execute(insert(NAMELESS).values(_make_row(nameless)))
            connection.execute(delete(NAMELESS).where(NAMELESS.c.digest == record.digest))
            connection.execute(insert(ADAPTERS).values(_make_row(record)))

        await self.write(write, lambda _: self.snapshot.add_adapter(record))

    async def remove_adapter(self, name: str) -> None:
        """Delete the record of `name`, which is kept elsewhere while a profile pins its content; files stay."""
        nameless = self.snapshot.will_keep(name)

        def write(connection: Connection) -> None:
            connection.execute(delete(ADAPTERS).where(ADAPTERS.c.name == name))
            if nameless is not None:
                connection.execute(insert(NAMELESS).values(_make_row(nameless)))

        await self.write(write, lambda _: self.snapshot.remove_adapter(name))

    async def add_version(self, profile: ProfileVersion) -> None:
        """Insert a new version and make it the current one, in one transaction."""
        name, version, body = profile.name, profile.version, to_json(profile.body())

        def write(connection: Connection) -> None:
            row = update(PROFILES).where(PROFILES.c.name == name).values(current=version)
            if connection.execute(row).rowcount == 0:
                connection.execute(insert(PROFILES).values(name=name, current=version))
            connection.execute(insert(VERSIONS).values(name=name, version=version, body=body))

        def apply(_: None) -> None:
            self.snapshot.add_version(profile, len(body))
            self.snapshot.set_current(name, version)

        await self.write(write, apply)

    async def set_current(self, name: str, version: int) -> ProfileVersion:
        """Make an existing version the current one."""

        def write(connection: Connection) -> None:
            row = update(PROFILES).where(PROFILES.c.name == name).values(current=version)
            if connection.execute(row).rowcount == 0:
                connection.execute(insert(PROFILES).values(name=name, current=version))

        await self.write(write, lambda _: self.snapshot.set_current(name, version))
        return self.profiles[name]

    async def remove_profile(self, name: str) -> None:
        """Delete the profile, all its versions, and what is kept for them alone."""
        unpinned = [{"gone": digest} for digest in self.snapshot.list_unpinned(name)]

        def write(connection: Connection) -> None:
            connection.execute(delete(VERSIONS).where(VERSIONS.c.name == name))
            connection.execute(delete(PROFILES).where(PROFILES.c.name == name))
            if unpinned:
                connection.execute(delete(NAMELESS).where(NAMELESS.c.digest == bindparam("gone")), unpinned)

        await self.write(write, lambda _: self.snapshot.remove_profile(name))

    async def read(self, read: Callable[[Connection], T]) -> T:
        """What `read` returns, in one transaction."""

        def call(within_s: float) -> T:
            with self._database.transaction(within_s) as connection:
                return read(connection)

        await self.settle()
        return await self._run(call)

    async def write(self, write: Callable[[Connection], T], apply: Callable[[T], None]) -> T:
        """Run `write` in one transaction and then `apply`, on the event loop, on what it returned.

        Applied even when the caller has left meanwhile: the snapshot follows the database.
        """
        loop = asyncio.get_running_loop()

        def call(within_s: float) -> T:
            with self._database.transaction(within_s) as connection:
                result = write(connection)
            loop.call_soon_threadsafe(apply, result)
            return result

        try:
            return await self._run(call)
        except BaseException:  # the caller has left first, perhaps: it may come true yet
            self._uncertain = True
            raise

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
        except (SQLAlchemyError, ExpiredError) as error:
            message = f"The registry's database failed: {type(error).__name__}; try again."
            raise ApiError(503, message) from error

    def _replace(self, snapshot: Snapshot) -> None:
        log.warning("the registry was read again after its connection was lost")
        for digest, norm in snapshot.norms.items():
            snapshot.norms[digest] = norm or self.snapshot.norms.get(digest, 0.0)  # measured since the start
        self.snapshot = snapshot

    def close(self) -> None:
        """Release the connection; waits for a call that runs, which is interrupted."""
        self._threads.close()
        self._database.interrupt()
        if self._busy.acquire(timeout=self._timeout_s):
            self._database.close()
            self._busy.release()


def _make_row(record: AdapterRecord) -> dict[str, str]:
    return {"name": record.name, "digest": record.digest, "info": to_json(record.info), "created": record.created}


def to_json(content: Mapping[str, Any]) -> str:
    """JSON as the tables hold it, in ASCII; ValueError for NaN and infinite numbers."""
    return json.dumps(dict(content), allow_nan=False)
