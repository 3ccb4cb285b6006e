"""The registry's tables (SQLAlchemy); a change of them is a new file in `migrations/versions`, too."""

from sqlalchemy import BigInteger, Column, DateTime, ForeignKey, Integer, MetaData, String, Table, Text

from adapters.recipes import MAX_NAME

METADATA = MetaData()

ADAPTERS = Table(
    "adapters",
    METADATA,
    Column("name", String(MAX_NAME), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("info", Text, nullable=False),
    Column("created", String(32), nullable=False),
)
NAMELESS = Table(
    "nameless_adapters",
    METADATA,
    Column("digest", String(64), primary_key=True),
    Column("name", String(MAX_NAME), nullable=False),
    Column("info", Text, nullable=False),
    Column("created", String(32), nullable=False),
)
"""Adapters that have lost their last name, which is `name`, while a version of a profile pins their content."""
PROFILES = Table(
    "profiles",
    METADATA,
    Column("name", String(MAX_NAME), primary_key=True),
    Column("current", Integer, nullable=False),
)
VERSIONS = Table(
    "profile_versions",
    METADATA,
    Column("name", String(MAX_NAME), ForeignKey("profiles.name"), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("body", Text, nullable=False),
)
SCORECARDS = Table(
    "scorecards",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("digest", String(64), index=True, nullable=False),
    Column("body", Text, nullable=False),
    Column("created", String(32), nullable=False),
)
REGISTRY = Table(
    "registry",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("identity", String(32), nullable=False),
    Column("changes", BigInteger, nullable=False),
)
"""One row: which registry this is, and how many changes were made to all other tables but the next."""
LEASES = Table(
    "leases",
    METADATA,
    Column("key", String(64), primary_key=True),
    Column("holder", String(32), nullable=False),
    Column("until", DateTime(timezone=True), nullable=False),
)
"""Which replica makes a stack or build, and until when the others leave it to that one."""
