"""The rows of a registry as lines of JSON: read at one moment from any database, and put into any.

What SQLite has where text is expected may be bytes that are none, in a damaged file: they are carried as they are.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, LargeBinary, MetaData, Text, cast, event, literal, text

PASSING = ("alembic_version", "leases", "limit_shares")
"""Tables of what is under way, and of the schema's version, which a backup's manifest has."""
BYTES = "$bytes"
"""Key of what stands for bytes, in base64; `text` says that SQLite takes them for a text."""


class _BadText(bytes):
    """Text of a damaged SQLite file, which is none."""


def keep_bytes(engine: Engine) -> None:
    """Make SQLite connections return text that is not valid UTF-8 as bytes instead of raising."""
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", lambda driver, _: setattr(driver, "text_factory", _read_text))


def _read_text(content: bytes) -> str | bytes:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return _BadText(content)


def _write_bytes(content: object) -> dict[str, Any]:
    """Bytes in JSON, which has none."""
    assert isinstance(content, bytes)
    return {BYTES: base64.b64encode(content).decode(), "text": isinstance(content, _BadText)}


def read_rows(connection: Connection) -> Iterator[tuple[str, dict[str, Any]]]:
    """All rows with their table, but for `PASSING`, in an order in which they can be inserted."""
    metadata = MetaData()
    metadata.reflect(connection)
    for table in metadata.sorted_tables:
        if table.name not in PASSING:
            for row in connection.execute(table.select()).mappings():
                yield table.name, dict(row)


def format_row(table: str, row: Mapping[str, Any]) -> str:
    """Its line, for `insert_rows`."""
    return json.dumps({"table": table, "row": row}, default=_write_bytes) + "\n"


def insert_rows(connection: Connection, file: Path) -> None:
    """Put the rows in `file` into tables of the same schema, in the place of what a migration has put there."""
    metadata = MetaData()
    metadata.reflect(connection)
    for table in reversed(metadata.sorted_tables):
        if table.name not in PASSING:
            connection.execute(table.delete())
    with file.open() as lines:
        for line in lines:
            content = json.loads(line)
            table, row = metadata.tables[content["table"]], content["row"]
            odd = {name: _read_bytes(value, connection) for name, value in row.items() if isinstance(value, Mapping)}
            connection.execute(table.insert().values(row | odd) if odd else table.insert(), None if odd else row)
    if connection.dialect.name == "postgresql" and "scorecards" in metadata.tables:
        sequence = "pg_get_serial_sequence('scorecards', 'id')"
        connection.execute(text(f"SELECT setval({sequence}, COALESCE((SELECT MAX(id) FROM scorecards), 0) + 1, false)"))


def _read_bytes(value: Mapping[str, Any], connection: Connection) -> Any:
    """What `_write_bytes` wrote, as SQL; PostgreSQL has no text that is none: it gets its digits."""
    content = base64.b64decode(value[BYTES])
    if connection.dialect.name == "postgresql":
        return content.decode(errors="backslashreplace")
    return cast(literal(content, LargeBinary), Text) if value["text"] else literal(content, LargeBinary)
