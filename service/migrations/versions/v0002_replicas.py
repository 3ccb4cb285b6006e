"""What replicas share: the registry's identity, the number of its changes, and leases of what is being made."""

import secrets

from alembic import op
from sqlalchemy import BigInteger, Column, DateTime, Integer, String, select

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add both tables; a server that was killed in between does it again."""
    registry = op.create_table(
        "registry",
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("identity", String(32), nullable=False),
        Column("changes", BigInteger, nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "leases",
        Column("key", String(64), primary_key=True),
        Column("holder", String(32), nullable=False),
        Column("until", DateTime(timezone=True), nullable=False),
        if_not_exists=True,
    )
    if op.get_bind().execute(select(registry.c.id)).first() is None:
        op.bulk_insert(registry, [{"id": 1, "identity": secrets.token_hex(16), "changes": 0}])
