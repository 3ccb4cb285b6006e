"""The registry in memory, which requests read: records, what cannot be read, and what all of it adds up to."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Select, func, select

from service.database import Database
from service.key_records import ApiKey, is_id, read_key
from service.records import AdapterRecord, DamageError, ProfileVersion, read_adapter, read_version
from service.tables import ADAPTERS, KEYS, NAMELESS, PINNED, PROFILES, REGISTRY, SCORECARDS, VERSIONS
from service.tenants import join_key, split_key

Rows = Callable[[Select[Any]], Iterator[Any]]
ROW_BYTES = 1024
"""What a profile version or a scorecard counts for on top of its JSON text, about what it takes in memory."""


@dataclass(slots=True)
class Snapshot:
    """The tables' content of all tenants, by registered names: `views` has what one tenant sees of it.

    Read and changed on the event loop only, so that no reader sees half a change.
    """

    adapters: dict[str, AdapterRecord] = field(default_factory=dict)
    nameless: dict[str, AdapterRecord] = field(default_factory=dict)
    """The last record of adapters that have no name any more and that a version of a profile pins, by digest."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Rank of every adapter with a name or kept, by digest."""
    norms: dict[str, float] = field(default_factory=dict)
    """Norm of every adapter with a name or kept, by digest; 0 until measured, of records from before that was done."""
    built: dict[str, str] = field(default_factory=dict)
    """The layers that are served built, of every adapter with a name or kept that has some, by digest."""
    gates: dict[str, str] = field(default_factory=dict)
    """How the value of a gate is read, as JSON text, of every gate with a name or kept, by digest."""
    profiles: dict[str, ProfileVersion] = field(default_factory=dict)
    """The current versions."""
    versions: dict[str, dict[int, ProfileVersion]] = field(default_factory=dict)
    damaged_adapters: dict[str, str] = field(default_factory=dict)
    """Why an adapter's row cannot be read, by name."""
    damaged_profiles: dict[str, str] = field(default_factory=dict)
    """Why a profile has no current version, by name."""
    damaged_versions: dict[str, dict[int, str]] = field(default_factory=dict)
    """Why a version cannot be read, by name and number."""
    scorecard_counts: Counter[str] = field(default_factory=Counter)
    """By tenant and fusion digest, joined as a registered name."""
    scorecard_bytes: Counter[str] = field(default_factory=Counter)
    pins: dict[str, Counter[str]] = field(default_factory=dict)
    """For every digest of an adapter, the profiles that pin it and in how many versions."""
    fusions: Counter[str] = field(default_factory=Counter)
    """Fusion digests of adapters alone and of profile versions, by tenant and digest, joined as a registered name."""
    pinned: dict[str, str] = field(default_factory=dict)
    """Since when profiles stay in the engine, by registered name."""
    keys: dict[str, ApiKey] = field(default_factory=dict)
    """API keys by id, those included that are not taken any more."""
    damaged_keys: dict[str, str] = field(default_factory=dict)
    """Why a key's row cannot be read, by id."""
    nbytes: int = 0
    """Bytes of all profile versions and scorecards."""
    profile_bytes: Counter[str] = field(default_factory=Counter)
    """Of all versions of each profile."""

    @property
    def has_keys(self) -> bool:
        """Whether there has ever been a key."""
        return bool(self.keys or self.damaged_keys)

    def is_revoked(self, key: str) -> bool:
        """Whether the API key with this public id was revoked. One of the registry's that is gone has ended and made
        room, and of one whose row cannot be read nobody knows: these count as revoked, too.
        """
        known = self.keys.get(key)
        return is_id(key) if known is None else known.revoked is not None

    def add_adapter(self, record: AdapterRecord) -> None:
        """Put a record in, over what had its name."""
        self.remove_adapter(record.key)
        self.nameless.pop(record.digest, None)
        self.adapters[record.key] = record
        self._measure(record)
        self.fusions[join_key(record.tenant, record.info["fusion_digest"])] += 1

    def keep(self, record: AdapterRecord) -> None:
        """Put in the record of an adapter without a name."""
        if record.digest not in self.ranks:
            self.nameless[record.digest] = record
            self._measure(record)

    @property
    def needed(self) -> set[str]:
        """Digests of all adapters that have a name or are pinned by a profile version."""
        return {*self.ranks, *self.pins}

    @property
    def may_hide_adapters(self) -> bool:
        """Whether there are rows that cannot be read and may name, or pin, any adapter."""
        return bool(self.damaged_adapters or self.damaged_versions)

    def is_last(self, record: AdapterRecord, within: str | None = None) -> bool:
        """Whether no other name than this record's has its content: of any tenant, or of the one `within`."""
        others = (r for r in self.adapters.values() if r.digest == record.digest and r.key != record.key)
        return not any(within in (None, other.tenant) for other in others)

    def list_users(self, record: AdapterRecord) -> list[str]:
        """Registered names of the profiles with any version whose recipe has this adapter by its name, sorted.

        An adapter of a tenant with the same name and content is not the public one.
        """
        name, digest, found = record.name, record.digest, []
        for key in sorted(self.pins.get(digest, ())):
            tenant = split_key(key)[0]
            own = self.adapters.get(join_key(tenant, name))
            is_meant = record.tenant == tenant or (not record.tenant and (own is None or own.digest != digest))
            if is_meant and any(v.parents.get(name) == digest for v in self.versions.get(key, {}).values()):
                found.append(key)
        return found

    def will_keep(self, name: str) -> AdapterRecord | None:
        """The record that is kept when `name` goes: of a content that has no other name and that a profile pins."""
        record = self.adapters.get(name)
        return record if record is not None and record.digest in self.pins and self.is_last(record) else None

    def remove_adapter(self, name: str) -> None:
        """Take a record, or a damaged row, out."""
        self.damaged_adapters.pop(name, None)
        if (nameless := self.will_keep(name)) is not None:
            self.nameless[nameless.digest] = nameless
        if (record := self.adapters.pop(name, None)) is not None:
            self._count_off(self.fusions, join_key(record.tenant, record.info["fusion_digest"]))
            if nameless is None and self.is_last(record):  # two names may share files
                self._forget(record.digest)

    def add_version(self, version: ProfileVersion, size: int) -> None:
        """Put a version of `size` bytes in."""
        self.versions.setdefault(version.key, {})[version.version] = version
        self.fusions[join_key(version.tenant, version.digest)] += 1
        for digest in set(version.parents.values()):
            self.pins.setdefault(digest, Counter())[version.key] += 1
        self.add_bytes(version.key, size)

    def set_current(self, name: str, version: int) -> None:
        """Make a version of a profile the current one."""
        self.damaged_profiles.pop(name, None)
        self.profiles[name] = self.versions[name][version]

    def list_unpinned(self, name: str) -> list[str]:
        """The digests in `nameless` that nothing needs without the profile `name`; a version of another one that cannot
        be read may pin what no other version does.
        """
        is_readable = self.damaged_versions.keys() <= {name}
        pins = {digest: set(self.pins.get(digest, ())) for digest in self.nameless}
        return [digest for digest, names in pins.items() if names == {name} or (is_readable and not names)]

    def remove_profile(self, name: str) -> None:
        """Take a profile and all its versions out."""
        unpinned = self.list_unpinned(name)
        self.profiles.pop(name, None)
        self.pinned.pop(name, None)
        self.damaged_profiles.pop(name, None)
        self.damaged_versions.pop(name, None)
        for version in self.versions.pop(name, {}).values():
            self._count_off(self.fusions, join_key(version.tenant, version.digest))
            for digest in set(version.parents.values()):
                self._count_off(self.pins[digest], name)
        self.pins = {digest: names for digest, names in self.pins.items() if names}
        for digest in unpinned:
            del self.nameless[digest]
            self._forget(digest)
        self.nbytes -= self.profile_bytes.pop(name, 0)

    def add_bytes(self, profile: str, size: int) -> None:
        """Count the row of a version of `profile`."""
        self.profile_bytes[profile] += size + ROW_BYTES
        self.nbytes += size + ROW_BYTES

    def add_scorecards(self, digest: str, size: int, count: int = 1, *, tenant: str = "") -> None:
        """Count a tenant's scorecards of `size` bytes together."""
        key = join_key(tenant, digest)
        self.scorecard_counts[key] += count
        self.scorecard_bytes[key] += size
        self.nbytes += size + count * ROW_BYTES

    def remove_scorecards(self, digest: str, size: int, count: int, *, tenant: str = "") -> None:
        """Count a tenant's scorecards of `size` bytes together off."""
        self.add_scorecards(digest, -size, -count, tenant=tenant)
        key = join_key(tenant, digest)
        if self.scorecard_counts[key] <= 0:
            del self.scorecard_counts[key], self.scorecard_bytes[key]

    def _measure(self, record: AdapterRecord) -> None:
        self.ranks[record.digest] = record.rank
        self.norms[record.digest] = record.norm or self.norms.get(record.digest, 0.0)
        if record.built:
            self.built[record.digest] = record.built
        if record.gate:
            self.gates[record.digest] = record.gate

    def _forget(self, digest: str) -> None:
        del self.ranks[digest], self.norms[digest]
        self.built.pop(digest, None)
        self.gates.pop(digest, None)

    @staticmethod
    def _count_off(counter: Counter[str], key: str) -> None:
        counter[key] -= 1
        if counter[key] <= 0:
            del counter[key]


def read_snapshot(database: Database) -> tuple[Snapshot, int]:
    """All tables of `database`, and how many changes had been made to them; rows that cannot be read are kept aside
    with the reason.
    """
    snapshot = Snapshot()
    with database.reading() as rows:
        ((changes,),) = rows(select(REGISTRY.c.changes))
        _read_adapters(snapshot, rows)
        _read_profiles(snapshot, rows)
        snapshot.pinned.update(
            (str(name), str(created)) for name, created in rows(select(PINNED).order_by(PINNED.c.name))
        )
        size = func.coalesce(func.sum(func.length(SCORECARDS.c.body)), 0)
        groups = (SCORECARDS.c.tenant, SCORECARDS.c.digest)
        for tenant, digest, nbytes, count in rows(select(*groups, size, func.count()).group_by(*groups)):
            snapshot.add_scorecards(str(digest), nbytes, count, tenant=str(tenant))
        _read_keys(snapshot, rows)
    return snapshot, changes


def _read_keys(snapshot: Snapshot, rows: Rows) -> None:
    columns = [column for column in KEYS.c if column.name != "used"]
    for row in rows(select(*columns)):
        try:
            key = read_key({column.name: value for column, value in zip(columns, row, strict=True)})
        except DamageError as error:
            snapshot.damaged_keys[str(row.id)] = str(error)
        else:
            snapshot.keys[key.id] = key


def _read_adapters(snapshot: Snapshot, rows: Rows) -> None:
    for row in rows(select(ADAPTERS).order_by(ADAPTERS.c.name)):
        try:
            snapshot.add_adapter(read_adapter(*row))
        except DamageError as error:
            snapshot.damaged_adapters[str(row.name)] = str(error)
    for row in rows(select(*(NAMELESS.c[column.name] for column in ADAPTERS.c))):
        with suppress(DamageError):  # the profiles that pin it are shown as damaged
            snapshot.keep(read_adapter(*row))


def _read_profiles(snapshot: Snapshot, rows: Rows) -> None:
    for name, number, body, checksum in rows(select(VERSIONS)):
        try:
            snapshot.add_version(read_version(name, number, body, checksum), len(body))
        except DamageError as error:
            number = number if isinstance(number, int) else 0
            snapshot.damaged_versions.setdefault(str(name), {})[number] = str(error)
            snapshot.add_bytes(str(name), len(str(body)))
    for name, number in rows(select(PROFILES).order_by(PROFILES.c.name)):
        _set_current(snapshot, str(name), number)
    for name in {*snapshot.versions, *snapshot.damaged_versions} - {*snapshot.profiles, *snapshot.damaged_profiles}:
        snapshot.damaged_profiles[name] = "no version of it is the current one"


def _set_current(snapshot: Snapshot, name: str, number: int) -> None:
    reasons = snapshot.damaged_versions.get(name, {})
    if number in snapshot.versions.get(name, {}):
        snapshot.set_current(name, number)
    elif number in reasons:
        snapshot.damaged_profiles[name] = f"its version {number}: {reasons[number]}"
    else:
        snapshot.damaged_profiles[name] = f"it has no version {str(number)[:100]!r}, which should be the current one"
