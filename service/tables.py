"""The registry's tables (SQLAlchemy); a change of them is a new file in `migrations/versions`, too."""

from sqlalchemy import BigInteger, Column, DateTime, ForeignKey, Integer, MetaData, String, Table, Text

from adapters.recipes import MAX_NAME

METADATA = MetaData()
MAX_TENANT = 32
MAX_KEY = MAX_TENANT + 1 + MAX_NAME
"""Characters of a name together with the tenant it belongs to."""

ADAPTERS = Table(
    "adapters",
    METADATA,
    Column("name", String(MAX_KEY), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("info", Text, nullable=False),
    Column("created", String(32), nullable=False),
    Column("checksum", String(64)),
)
"""`checksum`, here and below, is that of the row's other columns (`records`); NULL in rows of earlier versions."""
NAMELESS = Table(
    "nameless_adapters",
    METADATA,
    Column("digest", String(64), primary_key=True),
    Column("name", String(MAX_KEY), nullable=False),
    Column("info", Text, nullable=False),
    Column("created", String(32), nullable=False),
    Column("checksum", String(64)),
)
"""Adapters that have lost their last name, which is `name`, while a version of a profile pins their content."""
PROFILES = Table(
    "profiles",
    METADATA,
    Column("name", String(MAX_KEY), primary_key=True),
    Column("current", Integer, nullable=False),
)
VERSIONS = Table(
    "profile_versions",
    METADATA,
    Column("name", String(MAX_KEY), ForeignKey("profiles.name"), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("body", Text, nullable=False),
    Column("checksum", String(64)),
)
PINNED = Table(
    "pinned_profiles",
    METADATA,
    Column("name", String(MAX_KEY), primary_key=True),
    Column("created", String(32), nullable=False),
)
"""Profiles that stay in the engine, and since when."""
SCORECARDS = Table(
    "scorecards",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("digest", String(64), index=True, nullable=False),
    Column("body", Text, nullable=False),
    Column("created", String(32), nullable=False),
    Column("tenant", String(MAX_TENANT), nullable=False, server_default=""),
    Column("key", String(32), nullable=False, server_default=""),
)
"""`key` is the public id of the API key that a scorecard was added with."""
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
KEYS = Table(
    "keys",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("hash", String(64), nullable=False),
    Column("old_hash", String(64)),
    Column("old_until", String(32)),
    Column("role", String(16), nullable=False),
    Column("tenant", String(MAX_TENANT), nullable=False),
    Column("info", Text, nullable=False),
    Column("created", String(32), nullable=False),
    Column("expires", String(32)),
    Column("revoked", String(32)),
    Column("used", String(32)),
)
"""API keys, hashed; `old_hash` is taken, too, until `old_until`, after a rotation; `used` is when one was last, to the
minute. Times are ISO 8601, UTC."""
AUDIT = Table(
    "audit",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("body", Text, nullable=False),
    Column("hash", String(64), nullable=False),
)
"""Every change, in order; `hash` is that of the entry before and this one's body."""
LIMIT_SHARES = Table(
    "limit_shares",
    METADATA,
    Column("subject", String(64), primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("holder", String(32), primary_key=True),
    Column("amount", BigInteger, nullable=False),
    Column("until", DateTime(timezone=True), nullable=False),
)
"""How much of a limit each replica may use; `holder` is the replica, whose share nobody else has until `until`."""
