"""The profiles that stay in the engine: their names and since when."""

from alembic import op
from sqlalchemy import Column, String

revision = "0005"
down_revision = "0004"
MAX_KEY = 161


def upgrade() -> None:
    """Add the table; a server that was killed in between does it again."""
    op.create_table(
        "pinned_profiles",
        Column("name", String(MAX_KEY), primary_key=True),
        Column("created", String(32), nullable=False),
        if_not_exists=True,
    )
