"""The registry's one connection to its database: every call ends, and one server at a time has the tables.

Whoever has the connection also holds a lock on the tables: in PostgreSQL an advisory lock of the session, so that
the lock is lost with the connection, and a new connection gets it only once the server has ended the old session
with all it was still to commit; for SQLite a lock of a file beside the database's.
"""

import contextlib
import fcntl
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Connection, NullPool, Select, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from adapters.recipes import MAX_NAME
from service.tables import METADATA

LOCK_WAIT_S = 10
"""A server that is just stopping gives its tables back within this."""
ROWS_AT_ONCE = 100
CONNECT_TIMEOUT_S = 2
"""The shortest that PostgreSQL's client takes."""
_LOCK_KIND = 0x4C6F5241
"""Marks the lock as this project's: "LoRA" in ASCII."""
_LOCK = f"SELECT pg_try_advisory_lock({_LOCK_KIND} * 4294967296 + CAST(CAST('adapters' AS regclass) AS oid)::bigint)"

_SHORT_NAMES = """SELECT table_name FROM information_schema.columns WHERE table_schema = current_schema()
    AND column_name = 'name' AND character_maximum_length < :length"""


class OwnedError(RuntimeError):
    """Another server, or a lost connection of this one, has the registry's tables."""


class ExpiredError(RuntimeError):
    """A call took longer than it may, or its connection was lost before."""


class Database:
    """A connection and the lock on the tables. Every method blocks; all of them belong in one thread at a time.

    A call that fails or takes over `timeout_s` (seconds) closes the connection: what it wrote is committed or not, and
    only the next `connect` makes sure that no more comes of it.
    """

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self._url, self._timeout_s = make_url(url), timeout_s
        if (backend := self._url.get_backend_name()) not in ("sqlite", "postgresql"):
            raise ValueError(f"the registry cannot be kept in {backend!r}: expected sqlite or postgresql+psycopg")
        self._is_postgres = backend == "postgresql"
        options = _postgres_options(self._url, timeout_s) if self._is_postgres else _sqlite_options(timeout_s)
        self._engine = create_engine(self._url, poolclass=NullPool, connect_args=options)
        event.listen(self._engine, "connect", self._prepare, insert=True)
        self._connection: Connection | None = None
        self._expired = False
        self._driver: Any = None
        self._socket: socket.socket | None = None
        self._lock_file: IO[str] | None = None

    @property
    def where(self) -> str:
        """The database's URL without its password."""
        return self._url.render_as_string(hide_password=True)

    @property
    def connected(self) -> bool:
        """Whether the connection is there, as far as its last use shows."""
        return self._connection is not None

    def connect(self, *, wait_s: float = 0) -> None:
        """Connect, make the tables where they are missing, and lock them; OwnedError when that takes over `wait_s`."""
        deadline = time.monotonic() + wait_s
        with self._bound(self._timeout_s + wait_s):
            self._connection = self._engine.connect()
            with self._connection.begin():
                METADATA.create_all(self._connection)
            while not self._lock(self._connection):
                if time.monotonic() >= deadline:
                    raise OwnedError(f"another server uses the registry in {self.where!r}")
                time.sleep(0.2)
            if self._is_postgres:
                _widen_names(self._connection)

    def check(self) -> bool:
        """Whether the connection still answers."""
        try:
            with self.transaction(self._timeout_s) as connection:
                connection.execute(text("SELECT 1"))
        except (SQLAlchemyError, ExpiredError):
            return False
        return True

    @contextlib.contextmanager
    def transaction(self, within_s: float) -> Iterator[Connection]:
        """One transaction that ends within `within_s`: committed at the end of the block, or failed."""
        if self._connection is None:
            raise ExpiredError("the connection is lost")
        with self._bound(within_s), self._connection.begin():
            yield self._connection

    def rows(self, query: Select[Any]) -> Iterator[Any]:
        """All rows of `query`, fetched some at a time, each time within the limit."""
        with self.transaction(math.inf) as connection:
            with self._bound(self._timeout_s):
                parts = connection.execute(query.execution_options(yield_per=ROWS_AT_ONCE)).partitions()
            while True:
                with self._bound(self._timeout_s):
                    part = next(parts, None)
                if part is None:
                    return
                yield from part

    def disconnect(self) -> None:
        """Close the connection; the lock of a file stays."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(SQLAlchemyError):
                connection.invalidate()  # without a rollback, which would wait for the database
                connection.close()
        if self._socket is not None:
            self._socket.close()
        self._driver = self._socket = None

    def close(self) -> None:
        """Give the connection and the lock back."""
        self.disconnect()
        if self._lock_file is not None:
            self._lock_file.close()

    @contextlib.contextmanager
    def _bound(self, seconds: float) -> Iterator[None]:
        """Interrupt what waits for the database when the block takes over `seconds`; any error disconnects."""
        self._expired = False
        timer = threading.Timer(seconds, self.interrupt)
        timer.daemon = True
        if seconds < math.inf:
            timer.start()
        try:
            yield
        except BaseException as error:
            self.disconnect()
            if self._expired:
                raise ExpiredError(f"the database took over {seconds:g} s") from error
            raise
        finally:
            timer.cancel()

    def interrupt(self) -> None:
        """End the call that runs, with an error; for other threads."""
        self._expired = True
        driver, copy = self._driver, self._socket
        with contextlib.suppress(Exception):  # closed meanwhile
            if copy is not None:
                copy.shutdown(socket.SHUT_RDWR)
            elif driver is not None:
                driver.interrupt()

    def _prepare(self, driver: Any, _: object) -> None:
        """Set up a new connection of sqlite3 or psycopg before anything else is asked of it."""
        self._driver = driver
        if self._is_postgres:
            # psycopg waits without end for a server that accepts and never answers; only shutting its socket ends
            # that. A copy of it, since the number of psycopg's own may be another file's by then.
            self._socket = socket.socket(fileno=os.dup(driver.fileno()))
        else:
            driver.text_factory = _decode
            # WAL survives SIGKILL at any moment; FULL makes each commit durable before it is answered.
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                driver.execute(f"PRAGMA {pragma}")
        if self._expired:
            self.disconnect()
            raise ExpiredError("the database took too long to connect")

    def _lock(self, connection: Connection) -> bool:
        """Whether this server has the tables now."""
        if self._is_postgres:
            with connection.begin():
                return bool(connection.execute(text(_LOCK)).scalar())
        with connection.begin():
            path = connection.execute(text("SELECT file FROM pragma_database_list WHERE name = 'main'")).scalar()
        if self._lock_file is None and path:
            handle = Path(f"{Path(path).resolve()}.lock").open("w")  # noqa: SIM115 - open for as long as the lock is held
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.close()
                return False
            self._lock_file = handle
        return True


def _widen_names(connection: Connection) -> None:
    """Let tables of earlier versions, whose names had 64 characters, hold the longest names."""
    with connection.begin():
        short = connection.execute(text(_SHORT_NAMES), {"length": MAX_NAME}).scalars()
        for table in set(short) & METADATA.tables.keys():
            connection.execute(text(f'ALTER TABLE "{table}" ALTER COLUMN name TYPE VARCHAR({MAX_NAME})'))


def _sqlite_options(timeout_s: float) -> dict[str, Any]:
    return {"timeout": timeout_s, "check_same_thread": False}


def _postgres_options(url: URL, timeout_s: float) -> dict[str, Any]:
    """libpq's options: both ends give up on what does not answer."""
    milliseconds, idle_s = math.ceil(1000 * timeout_s), math.ceil(timeout_s)
    session = dict.fromkeys(("statement_timeout", "lock_timeout", "tcp_user_timeout"), milliseconds)
    session |= {"idle_in_transaction_session_timeout": 2 * milliseconds}
    session |= {"tcp_keepalives_idle": idle_s, "tcp_keepalives_interval": idle_s, "tcp_keepalives_count": 3}
    given = url.query.get("options", "")
    return {
        "application_name": "lora-fusion",
        "connect_timeout": max(CONNECT_TIMEOUT_S, math.ceil(timeout_s)),
        "keepalives": 1,
        "keepalives_idle": idle_s,
        "keepalives_interval": idle_s,
        "keepalives_count": 3,
        "tcp_user_timeout": milliseconds,
        "options": " ".join([str(given), *(f"-c {name}={value}" for name, value in session.items())]),
    }


def _decode(content: bytes) -> str:
    """Text of an SQLite file; a damaged one does not fail here, and is no valid name or JSON later."""
    return content.decode(errors="backslashreplace")
