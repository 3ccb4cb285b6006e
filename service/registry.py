"""What the server knows across restarts: adapters, versioned profiles, scorecards (SQLAlchemy).

Writes go to the database first and then to the in-memory snapshot that requests read, so a request costs
no query. One server owns a registry; a unique key on every name settles the remaining races.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ForeignKey, String, Text, create_engine, delete, event, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class _Base(DeclarativeBase):
    pass


class _AdapterRow(_Base):
    __tablename__ = "adapters"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    info: Mapped[str] = mapped_column(Text)
    created: Mapped[str] = mapped_column(String(32))


class _ProfileRow(_Base):
    __tablename__ = "profiles"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    current: Mapped[int]


class _VersionRow(_Base):
    __tablename__ = "profile_versions"
    name: Mapped[str] = mapped_column(ForeignKey("profiles.name"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str] = mapped_column(Text)


class _ScorecardRow(_Base):
    __tablename__ = "scorecards"
    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), index=True)
    body: Mapped[str] = mapped_column(Text)
    created: Mapped[str] = mapped_column(String(32))


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A registered adapter; its files lie in the store under `digest`."""

    name: str
    digest: str
    info: Mapping[str, Any]
    created: str

    @property
    def rank(self) -> int:
        """The adapter's largest rank in any module."""
        return int(self.info["rank"])


@dataclass(frozen=True, slots=True)
class ProfileVersion:
    """One version of a profile: canonical recipe with its parents pinned by digest, and defaults."""

    name: str
    version: int
    recipe: str
    parents: Mapping[str, str]
    digest: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""
    created: str = ""

    def body(self) -> dict[str, Any]:
        """JSON form without the name and version."""
        return {
            "recipe": self.recipe,
            "parents": dict(self.parents),
            "digest": self.digest,
            "defaults": dict(self.defaults),
            "description": self.description,
            "created": self.created,
        }


def now() -> str:
    """The time in UTC, ISO 8601, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Registry:
    """The tables and their snapshot. Methods that write block on the disk: call them in a thread."""

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url, pool_pre_ping=True)  # connections to a restarted database are replaced
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _sqlite_pragmas)
        _Base.metadata.create_all(self._engine)
        self.adapters: dict[str, AdapterRecord] = {}
        self.ranks: dict[str, int] = {}
        """Rank of every registered adapter, by digest."""
        self.profiles: dict[str, ProfileVersion] = {}
        self.versions: dict[str, dict[int, ProfileVersion]] = {}
        self.scorecard_counts: Counter[str] = Counter()
        self._read()

    def _read(self) -> None:
        with Session(self._engine) as session:
            for row in session.scalars(select(_AdapterRow).order_by(_AdapterRow.name)):
                self._remember(AdapterRecord(row.name, row.digest, json.loads(row.info), row.created))
            for version in session.scalars(select(_VersionRow)):
                profile = ProfileVersion(version.name, version.version, **json.loads(version.body))
                self.versions.setdefault(profile.name, {})[profile.version] = profile
            for current in session.scalars(select(_ProfileRow).order_by(_ProfileRow.name)):
                self.profiles[current.name] = self.versions[current.name][current.current]
            self.scorecard_counts.update(session.scalars(select(_ScorecardRow.digest)))

    def _remember(self, record: AdapterRecord) -> None:
        self.adapters[record.name] = record
        self.ranks[record.digest] = record.rank

    def add_adapter(self, record: AdapterRecord) -> None:
        """Insert; the caller has checked that the name is free."""
        with Session(self._engine) as session, session.begin():
            session.add(
                _AdapterRow(
                    name=record.name,
                    digest=record.digest,
                    info=json.dumps(dict(record.info)),
                    created=record.created,
                )
            )
        self._remember(record)

    def remove_adapter(self, name: str) -> None:
        """Delete the record of `name`; its files stay in the store."""
        with Session(self._engine) as session, session.begin():
            session.execute(delete(_AdapterRow).where(_AdapterRow.name == name))
        self.adapters.pop(name, None)
        self.ranks = {record.digest: record.rank for record in self.adapters.values()}  # two names may share files

    def add_version(self, profile: ProfileVersion) -> None:
        """Insert a new version and make it the current one, in one transaction."""
        with Session(self._engine) as session, session.begin():
            row = session.get(_ProfileRow, profile.name)
            if row is None:
                session.add(_ProfileRow(name=profile.name, current=profile.version))
            else:
                row.current = profile.version
            session.flush()
            body = json.dumps(profile.body())
            session.add(_VersionRow(name=profile.name, version=profile.version, body=body))
        self.versions.setdefault(profile.name, {})[profile.version] = profile
        self.profiles[profile.name] = profile

    def set_current(self, name: str, version: int) -> ProfileVersion:
        """Make an existing version the current one."""
        with Session(self._engine) as session, session.begin():
            row = session.get_one(_ProfileRow, name)
            row.current = version
        self.profiles[name] = self.versions[name][version]
        return self.profiles[name]

    def remove_profile(self, name: str) -> None:
        """Delete the profile and all its versions."""
        with Session(self._engine) as session, session.begin():
            session.execute(delete(_VersionRow).where(_VersionRow.name == name))
            session.execute(delete(_ProfileRow).where(_ProfileRow.name == name))
        self.profiles.pop(name, None)
        self.versions.pop(name, None)

    def needed_digests(self) -> set[str]:
        """Digests of all adapters whose files are needed: those with a name, and those that a profile version pins."""
        pinned = {d for versions in self.versions.values() for v in versions.values() for d in v.parents.values()}
        return pinned | {record.digest for record in self.adapters.values()}

    def pinning_profiles(self, digest: str) -> list[str]:
        """Profiles with any version that pins the adapter `digest`, by name."""
        return sorted(
            name
            for name, versions in self.versions.items()
            if any(digest in v.parents.values() for v in versions.values())
        )

    def add_scorecard(self, digest: str, body: Mapping[str, Any]) -> None:
        """Attach a measured result to a fusion digest."""
        with Session(self._engine) as session, session.begin():
            session.add(_ScorecardRow(digest=digest, body=json.dumps(dict(body)), created=now()))
        self.scorecard_counts[digest] += 1

    def scorecards(self, digest: str) -> list[dict[str, Any]]:
        """All results of a fusion digest, oldest first."""
        with Session(self._engine) as session:
            query = select(_ScorecardRow).where(_ScorecardRow.digest == digest).order_by(_ScorecardRow.id)
            return [json.loads(row.body) | {"created": row.created} for row in session.scalars(query)]

    def close(self) -> None:
        """Release the connections."""
        self._engine.dispose()


def _sqlite_pragmas(connection: Any, _record: Any) -> None:
    # WAL survives SIGKILL at any moment; FULL makes each commit durable before it is answered.
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
