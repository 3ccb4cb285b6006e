"""The tables as they were before migrations: made where they are missing, names widened that had 64 characters."""

from alembic import op
from sqlalchemy import Column, ForeignKey, Integer, String, Text

revision = "0001"
down_revision = None

NAME = 128


def upgrade() -> None:
    """Make the tables; those of earlier versions stay, with their rows."""
    op.create_table(
        "adapters",
        Column("name", String(NAME), primary_key=True),
        Column("digest", String(64), nullable=False),
        Column("info", Text, nullable=False),
        Column("created", String(32), nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "nameless_adapters",
        Column("digest", String(64), primary_key=True),
        Column("name", String(NAME), nullable=False),
        Column("info", Text, nullable=False),
        Column("created", String(32), nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "profiles",
        Column("name", String(NAME), primary_key=True),
        Column("current", Integer, nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "profile_versions",
        Column("name", String(NAME), ForeignKey("profiles.name"), primary_key=True),
        Column("version", Integer, primary_key=True, autoincrement=False),
        Column("body", Text, nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "scorecards",
        Column("id", Integer, primary_key=True),
        Column("digest", String(64), nullable=False),
        Column("body", Text, nullable=False),
        Column("created", String(32), nullable=False),
        if_not_exists=True,
    )
    op.create_index("ix_scorecards_digest", "scorecards", ["digest"], if_not_exists=True)
    if op.get_bind().dialect.name == "postgresql":  # SQLite has no lengths
        for table in ("adapters", "nameless_adapters", "profiles", "profile_versions"):
            op.alter_column(table, "name", type_=String(NAME))
