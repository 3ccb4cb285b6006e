"""The registry's one connection to its database: every call ends, and the tables have one server, or its replicas.

Whoever has the connection also holds a lock on the tables: in PostgreSQL an advisory lock of the session, so that
the lock is lost with the connection, and a new connection gets it only once the server has ended the old session
with all it was still to commit; for SQLite a lock of a file beside the database's. Replicas hold the lock together,
and change the tables in turn: the turn is another such lock.
"""

import contextlib
import fcntl
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Connection, NullPool, Select, create_engine, event, select, text, update
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from service.migrations import migrate
from service.tables import REGISTRY

LOCK_WAIT_S = 10
"""A server that is just stopping gives its tables back within this."""
ROWS_AT_ONCE = 100
CONNECT_TIMEOUT_S = 2
"""The shortest that PostgreSQL's client takes."""
_LOCK_KIND = 0x4C6F5241
"""Marks the lock as this project's: "LoRA" in ASCII."""
_TABLES = "COALESCE(CAST(to_regclass('adapters') AS oid)::bigint, 0)"
_LOCK = f"SELECT pg_try_advisory_lock{{}}({_LOCK_KIND} * 4294967296 + {_TABLES})"
_IN_SCHEMA = f"{_LOCK_KIND}, hashtext('{{}} ' || current_schema())"
_MIGRATION = f"SELECT pg_advisory_xact_lock({_IN_SCHEMA.format('migration')})"
_TAKE_TURN = f"SELECT pg_try_advisory_lock({_IN_SCHEMA.format('turn')})"
_GIVE_TURN = f"SELECT pg_advisory_unlock({_IN_SCHEMA.format('turn')})"
TURN_IDLE_S = 15
"""A session that has the turn and asks nothing for so long is ended: its replica stands still, others ask each second.
"""
_LIMIT_IDLE = "SELECT set_config(name, {}, false) FROM pg_settings WHERE name = 'idle_session_timeout'"
"""PostgreSQL 14 has it; with an earlier one a replica that stands still keeps its turn."""
CHANNEL = "lora_fusion_registry"
"""Of PostgreSQL's notifications: one when a change is committed."""


class OwnedError(RuntimeError):
    """Another server, or a lost connection of this one, has the registry's tables."""


class ExpiredError(RuntimeError):
    """A call took longer than it may, or its connection was lost before."""


FAILURES = SQLAlchemyError, ExpiredError, UnicodeDecodeError
"""What a call of a database raises that fails; the last for a damaged file, whose bytes SQLite's message quotes."""


class Database:
    """A connection and the lock on the tables. Every method blocks; all of them belong in one thread at a time.

    A call that fails or takes over `timeout_s` (seconds) closes the connection: what it wrote is committed or not, and
    only the next `connect` makes sure that no more comes of it.
    """

    def __init__(self, url: str, *, timeout_s: float, shared: bool = False) -> None:
        """`shared`: with replicas, which PostgreSQL alone can."""
        self._url, self._timeout_s = make_url(url), timeout_s
        if self._url.drivername in ("postgres", "postgresql"):
            self._url = self._url.set(drivername="postgresql+psycopg")
        if (backend := self._url.get_backend_name()) not in ("sqlite", "postgresql"):
            raise ValueError(f"the registry cannot be kept in {backend!r}: expected sqlite or postgresql")
        if shared and backend != "postgresql":
            raise ValueError(f"replicas cannot share a registry in {backend!r}: expected postgresql")
        self._is_postgres, self.shared = backend == "postgresql", shared
        self._options = _postgres_options(self._url, timeout_s) if self._is_postgres else _sqlite_options(timeout_s)
        self._engine = create_engine(self._url, poolclass=NullPool, connect_args=self._options)
        event.listen(self._engine, "connect", self._prepare, insert=True)
        self._connection: Connection | None = None
        self._expired = self._is_migrated = False
        self.identity = ""
        self.has_turn = False
        """Whether this replica may change the tables; lost with the connection."""
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
        """Connect, lock the tables and bring them to this version's schema; OwnedError when that takes over `wait_s`,
        NewerSchemaError when a newer version has been at them. Later connections leave the schema as it is.
        """
        deadline = time.monotonic() + wait_s
        with self._bound(self._timeout_s + wait_s):
            self._connection = self._engine.connect()
            self._wait_lock(self._connection, deadline)
            if not self._is_migrated:
                with self._connection.begin():
                    if self._is_postgres:
                        self._connection.execute(text(_MIGRATION))
                    migrate(self._connection)
                self._wait_lock(self._connection, deadline)  # there were no tables before, perhaps
                with self._connection.begin():
                    self.identity = str(self._connection.execute(select(REGISTRY.c.identity)).scalar_one())
                self._is_migrated = True

    def count_changes(self) -> int | None:
        """How many changes were made to the tables; None when the connection does not answer."""
        try:
            with self.transaction(self._timeout_s) as connection:
                return _read_changes(connection)
        except FAILURES:
            return None

    def record_change(self, connection: Connection) -> int:
        """Count the change that a transaction makes, and tell the other replicas once it is committed."""
        if self.shared and not self.has_turn:
            raise ExpiredError("the turn to change the tables was lost with the connection")
        connection.execute(update(REGISTRY).values(changes=REGISTRY.c.changes + 1))
        if self._is_postgres:
            connection.execute(text(f"NOTIFY {CHANNEL}"))
        return _read_changes(connection)

    def take_turn(self) -> bool:
        """Whether no other replica may change the tables until `give_turn`."""
        with self.transaction(self._timeout_s) as connection:
            self.has_turn = not self.shared or bool(connection.execute(text(_TAKE_TURN)).scalar())
            if self.shared and self.has_turn:
                connection.execute(text(_LIMIT_IDLE.format(f"'{TURN_IDLE_S}s'")))
        return self.has_turn

    def give_turn(self) -> None:
        """End this replica's turn."""
        if self.shared and self.has_turn:
            self.has_turn = False
            with self.transaction(self._timeout_s) as connection:
                connection.execute(text(_GIVE_TURN))
                connection.execute(text(_LIMIT_IDLE.format("reset_val")))

    def listen_options(self) -> dict[str, Any]:
        """psycopg's arguments for a connection of its own that hears of changes."""
        return {**self._engine.dialect.create_connect_args(self._url)[1], **self._options}

    @contextlib.contextmanager
    def transaction(self, within_s: float) -> Iterator[Connection]:
        """One transaction that ends within `within_s`: committed at the end of the block, or failed."""
        if self._connection is None:
            raise ExpiredError("the connection is lost")
        with self._bound(within_s), self._connection.begin():
            yield self._connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[Callable[[Select[Any]], Iterator[Any]]]:
        """One state of all tables, whatever is changed meanwhile: yields what fetches the rows of a query, some at a
        time, each time within the limit.
        """
        with self.transaction(math.inf) as connection:
            if self._is_postgres:
                with self._bound(self._timeout_s):
                    connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))

            def fetch(query: Select[Any]) -> Iterator[Any]:
                with self._bound(self._timeout_s):
                    parts = connection.execute(query.execution_options(yield_per=ROWS_AT_ONCE)).partitions()
                while True:
                    with self._bound(self._timeout_s):
                        part = next(parts, None)
                    if part is None:
                        return
                    yield from part

            yield fetch

    def disconnect(self) -> None:
        """Close the connection; the lock of a file stays."""
        connection, self._connection, self.has_turn = self._connection, None, False
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

    def _wait_lock(self, connection: Connection, deadline: float) -> None:
        """Lock the tables by `deadline` of the monotonic clock; OwnedError when others have them."""
        while not self._lock(connection):
            if time.monotonic() >= deadline:
                raise OwnedError(f"another server uses the registry in {self.where!r}")
            time.sleep(0.2)

    def _lock(self, connection: Connection) -> bool:
        """Whether this server has the tables now."""
        if self._is_postgres:
            with connection.begin():
                return bool(connection.execute(text(_LOCK.format("_shared" if self.shared else ""))).scalar())
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


def _read_changes(connection: Connection) -> int:
    return int(connection.execute(select(REGISTRY.c.changes)).scalar_one())


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
