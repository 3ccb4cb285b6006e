"""The audit as JSON lines in the data folder, for those who collect logs: what the registry has, line by line."""

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path

from sqlalchemy import Connection, select

from service.audit import AuditRow, read_entries
from service.tables import AUDIT

FILE = "audit.jsonl"
FILE_BYTES, OLD_FILES = 16 * 2**20, 3
"""When a file becomes `audit.jsonl.1`, and how many of those are kept."""
PAGE = 1000
LONGEST_LINE = 2**17
"""How much of a file's end is read to find its last line."""


class _Lines(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        raise  # it is called where an exception is handled


class AuditFile:
    """Follows the registry's audit. Belongs to the thread of the database; a file that cannot be written stops nothing,
    and is brought up to date as soon as it can.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._file = _Lines(self._path, maxBytes=FILE_BYTES, backupCount=OLD_FILES, delay=True, encoding="ascii")
        self._last = (0, "")
        """Id and hash of the last line."""
        self._is_known = False
        """Whether that has been read, and found in the registry."""

    def follow(self, transaction: Callable[[], AbstractContextManager[Connection]]) -> None:
        """Write what the registry has and the file does not. A file that is not of this registry is put aside."""
        if not self._is_known:
            self._last = self._read_last()
        is_whole = False
        while not is_whole:
            number, digest = self._last
            with transaction() as connection:  # the file is left alone meanwhile: its errors are not the database's
                is_ours = self._is_known or not number or _read_hash(connection, number) == digest
                rows = read_entries(connection, after=number if is_ours else 0, limit=PAGE)
            if not is_ours:
                self._file.doRollover()
                self._last = (0, "")
            self._is_known, is_whole = True, len(rows) < PAGE
            for row in rows:
                self._write(row)

    def _write(self, row: AuditRow) -> None:
        self._file.emit(logging.makeLogRecord({"msg": json.dumps(row.to_dict())}))
        self._last = (row.id, row.hash)

    def _read_last(self) -> tuple[int, str]:
        """Id and hash of the last whole line; what a kill has left behind it goes."""
        for path in (self._path, self._path.with_name(f"{FILE}.1")):
            with suppress(OSError, ValueError, KeyError, TypeError), path.open("rb+") as file:
                start = file.seek(max(0, file.seek(0, 2) - LONGEST_LINE))
                whole = file.read().rpartition(b"\n")[0]
                if whole:
                    file.truncate(start + len(whole) + 1)
                    line = json.loads(whole.rpartition(b"\n")[2])
                    return int(line["id"]), str(line["hash"])
        return 0, ""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _read_hash(connection: Connection, number: int) -> str | None:
    found: str | None = connection.execute(select(AUDIT.c.hash).where(AUDIT.c.id == number)).scalar()
    return found
