"""What the server knows across restarts: adapters, versioned profiles, scorecards; read from the snapshot in memory."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, update

from service.errors import ApiError
from service.follower import Follower
from service.records import AdapterRecord, ProfileVersion
from service.snapshot import ROW_BYTES
from service.tables import ADAPTERS, NAMELESS, PROFILES, VERSIONS

log = logging.getLogger("fusion")


class Registry(Follower):
    """The tables' records. Made in a thread; its other methods belong to one event loop."""

    def __init__(self, url: str, *, timeout_s: float, shared: bool = False) -> None:
        """As `Follower`; what cannot be read is logged."""
        super().__init__(url, timeout_s=timeout_s, shared=shared)
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

    def needed_digests(self) -> set[str]:
        """Digests of all adapters that have a name or are pinned by a profile version."""
        return self.snapshot.needed

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


def _make_row(record: AdapterRecord) -> dict[str, str]:
    return {"name": record.name, "digest": record.digest, "info": to_json(record.info), "created": record.created}


def to_json(content: Mapping[str, Any]) -> str:
    """JSON as the tables hold it, in ASCII; ValueError for NaN and infinite numbers."""
    return json.dumps(dict(content), allow_nan=False)
