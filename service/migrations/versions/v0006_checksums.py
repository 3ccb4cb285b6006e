"""Checksums of the rows of adapters and profile versions, which earlier versions insert and delete, never update."""

import json
from hashlib import sha256

from alembic import op
from sqlalchemy import Column, MetaData, String, Table, bindparam, inspect, select, update

revision = "0006"
down_revision = "0005"

TABLES = ("adapters", "profile_versions", "nameless_adapters")
"""In the order in which the transactions of replicas that still run lock them: neither waits for the other for ever."""


def upgrade() -> None:
    """Add the columns and fill them; a server that was killed in between does it again."""
    connection = op.get_bind()
    for name in TABLES:
        if "checksum" not in {column["name"] for column in inspect(connection).get_columns(name)}:
            op.add_column(name, Column("checksum", String(64)))
        table = Table(name, MetaData(), autoload_with=connection, resolve_fks=False)
        columns = [column for column in table.c if column.name != "checksum"]
        rows = connection.execute(select(*columns).where(table.c.checksum.is_(None))).mappings().all()
        sums = [
            {"sum": _sum(dict(row)), **{f"its_{key.name}": row[key] for key in table.primary_key}}
            for row in rows
            if not any(isinstance(value, bytes) for value in row.values())  # damage that shows without a checksum
        ]
        if sums:
            where = [key == bindparam(f"its_{key.name}") for key in table.primary_key]
            connection.execute(update(table).where(*where).values(checksum=bindparam("sum")), sums)


def _sum(row: dict[str, object]) -> str:
    return sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()
