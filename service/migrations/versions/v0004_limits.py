"""The shares that replicas have of the limits of keys and tenants."""

from alembic import op
from sqlalchemy import BigInteger, Column, DateTime, String

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the table; a server that was killed in between does it again."""
    op.create_table(
        "limit_shares",
        Column("subject", String(64), primary_key=True),
        Column("kind", String(16), primary_key=True),
        Column("holder", String(32), primary_key=True),
        Column("amount", BigInteger, nullable=False),
        Column("until", DateTime(timezone=True), nullable=False),
        if_not_exists=True,
    )
