"""API keys, what they changed, and whose things are: names hold their tenant, scorecards have one and a key."""

from alembic import op
from sqlalchemy import Column, Integer, String, Text, inspect

revision = "0003"
down_revision = "0002"
MAX_KEY, MAX_TENANT = 161, 32


def upgrade() -> None:
    """Add tables and columns and widen names; a server that was killed in between does it again."""
    connection = op.get_bind()
    op.create_table(
        "keys",
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
        if_not_exists=True,
    )
    op.create_table(
        "audit",
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("body", Text, nullable=False),
        Column("hash", String(64), nullable=False),
        if_not_exists=True,
    )
    if "tenant" not in {column["name"] for column in inspect(connection).get_columns("scorecards")}:
        op.add_column("scorecards", Column("tenant", String(MAX_TENANT), nullable=False, server_default=""))
        op.add_column("scorecards", Column("key", String(32), nullable=False, server_default=""))
    if connection.dialect.name == "postgresql":  # SQLite keeps texts of any length
        for table in ("profile_versions", "profiles", "adapters", "nameless_adapters"):
            op.alter_column(table, "name", type_=String(MAX_KEY))
