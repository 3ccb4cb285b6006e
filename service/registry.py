"""What the server knows across restarts: adapters, versioned profiles, scorecards; read from the snapshot in memory."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, update

from service.audit import Entry, describe_adapter, describe_version
from service.conditions import make_tag
from service.errors import ApiError
from service.follower import Follower
from service.ledger import Ledger
from service.quotas import Quotas
from service.records import AdapterRecord, ProfileVersion, add_checksum, now
from service.snapshot import ROW_BYTES
from service.tables import ADAPTERS, NAMELESS, PINNED, PROFILES, VERSIONS

log = logging.getLogger("fusion")


class Registry(Follower):
    """The tables' records. Made in a thread; its other methods belong to one event loop."""

    def __init__(self, url: str, *, timeout_s: float, shared: bool = False, folder: Path | None = None) -> None:
        """As `Follower`; what cannot be read is logged."""
        super().__init__(url, timeout_s=timeout_s, shared=shared, folder=folder)
        self.ledger = Ledger(share=0 if shared else math.inf)
        """What callers have used of their limits: kept when an engine dies."""
        self.quotas = Quotas()
        """What tenants may own."""
        for kind, rows in (
            ("adapter", self.snapshot.damaged_adapters),
            ("profile", self.snapshot.damaged_profiles),
            ("key", self.snapshot.damaged_keys),
        ):
            for name, reason in rows.items():
                log.error("%s %r is damaged: %s", kind, name, reason)

    @property
    def adapters(self) -> Mapping[str, AdapterRecord]:
        """All adapters of all tenants, by registered name; for one tenant's see `views`."""
        return self.snapshot.adapters

    @property
    def ranks(self) -> Mapping[str, int]:
        """Rank of every adapter that has a name or is pinned by a profile version, by digest."""
        return self.snapshot.ranks

    @property
    def profiles(self) -> Mapping[str, ProfileVersion]:
        """The current version of every profile of all tenants, by registered name."""
        return self.snapshot.profiles

    @property
    def versions(self) -> Mapping[str, Mapping[int, ProfileVersion]]:
        """All versions that can be read, by registered name and number."""
        return self.snapshot.versions

    def needed_digests(self) -> set[str]:
        """Digests of all adapters that have a name or are pinned by a profile version."""
        return self.snapshot.needed

    def is_needed(self, digest: str) -> bool:
        """Whether an adapter's files are needed: it has a name, a profile version pins it, or nobody knows: what the
        database holds is not known yet, or a row that cannot be read may name them, and be mended.
        """
        known = self.is_current and not self.snapshot.may_hide_adapters
        return not known or digest in self.ranks or digest in self.snapshot.pins

    def pinning_profiles(self, digest: str) -> list[str]:
        """Profiles with any version that pins the adapter `digest`, by registered name."""
        return sorted(self.snapshot.pins.get(digest, ()))

    def describe(self, digest: str) -> str:
        """The first public name of an adapter, for messages that any tenant may read; the start of its digest when it
        has none. From any thread.
        """
        records = list(self.snapshot.adapters.values())
        names = [record.name for record in records if record.digest == digest and not record.tenant]
        return min(names, default=digest[:12])

    def version_numbers(self, key: str) -> set[int]:
        """The numbers of a profile's versions, by its registered name; those that cannot be read included."""
        return {*self.versions.get(key, ()), *self.snapshot.damaged_versions.get(key, ())}

    def tag_adapter(self, key: str) -> str | None:
        """The entity tag of what has this registered name: another one after every change of it. None for nothing."""
        if (reason := self.snapshot.damaged_adapters.get(key)) is not None:
            return make_tag([self.identity, key, reason])
        if (record := self.adapters.get(key)) is None:
            return None
        return make_tag([self.identity, key, record.digest, dict(record.info), record.created])

    def tag_profile(self, key: str, number: int | None = None) -> str | None:
        """As `tag_adapter`, of the current version of a profile, or the one with this number."""
        numbers = sorted(self.version_numbers(key))
        if number is None and (reason := self.snapshot.damaged_profiles.get(key)) is not None:
            return make_tag([self.identity, key, numbers, reason])
        version = self.profiles.get(key) if number is None else self.versions.get(key, {}).get(number)
        # With what nobody outside knows: a tag shows no more of a system prompt than that it has changed.
        return None if version is None else make_tag([self.identity, key, numbers, version.version, version.body()])

    def check_room(self, size: int, limit: int) -> None:
        """409 when another row of `size` bytes would not fit `limit` bytes, `FUSION_REGISTRY_BYTES`."""
        if self.snapshot.nbytes + size + ROW_BYTES > limit:
            message = f"The registry is full (FUSION_REGISTRY_BYTES={limit})"
            raise ApiError(409, f"{message}; delete profiles or scorecards first.")

    async def add_adapter(self, record: AdapterRecord) -> None:
        """Insert, in place of what has this name; the caller has checked that it may go."""
        nameless = self.snapshot.will_keep(record.key)
        before = describe_adapter(self.adapters.get(record.key))
        action = "adapter.add" if before is None else "adapter.replace"
        entry = Entry(action, record.key, before, describe_adapter(record))
        self.quotas.check_adapter(self.snapshot, record)

        def write(connection: Connection) -> None:
            connection.execute(delete(ADAPTERS).where(ADAPTERS.c.name == record.key))
            if nameless is not None:
                connection.execute(insert(NAMELESS).values(_make_row(nameless)))
            connection.execute(delete(NAMELESS).where(NAMELESS.c.digest == record.digest))
            connection.execute(insert(ADAPTERS).values(_make_row(record)))

        await self.write(write, lambda _: self.snapshot.add_adapter(record), lambda _: entry)

    async def remove_adapter(self, key: str) -> None:
        """Delete the record of a registered name, kept elsewhere while a profile pins its content; files stay."""
        nameless = self.snapshot.will_keep(key)
        entry = Entry("adapter.remove", key, describe_adapter(self.adapters.get(key)))

        def write(connection: Connection) -> None:
            connection.execute(delete(ADAPTERS).where(ADAPTERS.c.name == key))
            if nameless is not None:
                connection.execute(insert(NAMELESS).values(_make_row(nameless)))

        await self.write(write, lambda _: self.snapshot.remove_adapter(key), lambda _: entry)

    async def add_version(self, profile: ProfileVersion) -> None:
        """Insert a new version and make it the current one, in one transaction."""
        name, version, body = profile.key, profile.version, to_json(profile.body())
        before = describe_version(self.profiles.get(name))
        entry = Entry("profile.put", name, before, describe_version(profile))
        self.quotas.check_version(self.snapshot, name, len(body) + ROW_BYTES)

        def write(connection: Connection) -> None:
            row = update(PROFILES).where(PROFILES.c.name == name).values(current=version)
            if connection.execute(row).rowcount == 0:
                connection.execute(insert(PROFILES).values(name=name, current=version))
            connection.execute(insert(VERSIONS).values(add_checksum({"name": name, "version": version, "body": body})))

        def apply(_: None) -> None:
            self.snapshot.add_version(profile, len(body))
            self.snapshot.set_current(name, version)

        await self.write(write, apply, lambda _: entry)

    async def set_current(self, name: str, version: int) -> ProfileVersion:
        """Make an existing version of the profile with this registered name the current one."""
        before, after = describe_version(self.profiles.get(name)), describe_version(self.versions[name][version])
        entry = Entry("profile.rollback", name, before, after)

        def write(connection: Connection) -> None:
            row = update(PROFILES).where(PROFILES.c.name == name).values(current=version)
            if connection.execute(row).rowcount == 0:
                connection.execute(insert(PROFILES).values(name=name, current=version))

        await self.write(write, lambda _: self.snapshot.set_current(name, version), lambda _: entry)
        return self.profiles[name]

    async def set_pinned(self, name: str, *, pinned: bool) -> None:
        """Have the profile with this registered name stay in the engine, or not."""
        created = now()
        states = {"pinned": not pinned}, {"pinned": pinned}
        entry = Entry("profile.pin" if pinned else "profile.unpin", name, *states)

        def write(connection: Connection) -> None:
            connection.execute(delete(PINNED).where(PINNED.c.name == name))
            if pinned:
                connection.execute(insert(PINNED).values(name=name, created=created))

        def apply(_: None) -> None:
            if pinned:
                self.snapshot.pinned[name] = created
            else:
                self.snapshot.pinned.pop(name, None)

        await self.write(write, apply, lambda _: entry)

    async def remove_profile(self, name: str) -> None:
        """Delete the profile with this registered name, all its versions, and what is kept for them alone."""
        unpinned = [{"gone": digest} for digest in self.snapshot.list_unpinned(name)]
        entry = Entry("profile.remove", name, describe_version(self.profiles.get(name)))

        def write(connection: Connection) -> None:
            connection.execute(delete(VERSIONS).where(VERSIONS.c.name == name))
            connection.execute(delete(PROFILES).where(PROFILES.c.name == name))
            connection.execute(delete(PINNED).where(PINNED.c.name == name))
            if unpinned:
                connection.execute(delete(NAMELESS).where(NAMELESS.c.digest == bindparam("gone")), unpinned)

        await self.write(write, lambda _: self.snapshot.remove_profile(name), lambda _: entry)


def _make_row(record: AdapterRecord) -> dict[str, Any]:
    info = to_json(record.info)
    return add_checksum({"name": record.key, "digest": record.digest, "info": info, "created": record.created})


def to_json(content: Mapping[str, Any]) -> str:
    """JSON as the tables hold it, in ASCII; ValueError for NaN and infinite numbers."""
    return json.dumps(dict(content), allow_nan=False)
