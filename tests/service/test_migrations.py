"""Databases of every earlier version become today's, in SQLite and PostgreSQL, and nothing in them is lost."""

import json
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, inspect, text

from service import follower
from service.migrations import migrate
from service.records import AdapterRecord, add_checksum
from service.registry import Registry, to_json
from service.tables import METADATA
from tests.conftest import ROOT
from tests.service.conftest import adapter_info, fill
from tests.service.databases import Postgres

OLD = ROOT / "tests/service/aged/registry-d7a74cb.sqlite"
"""Made by the code of commit d7a74cb: two adapters, a profile with two versions, rolled back, and a scorecard."""
CREATED = "2026-01-01T00:00:00+00:00"
FIRST = (
    "CREATE TABLE adapters (name VARCHAR(64) NOT NULL PRIMARY KEY, digest VARCHAR(64) NOT NULL, info TEXT NOT NULL,"
    " created VARCHAR(32) NOT NULL)",
    "CREATE TABLE profiles (name VARCHAR(64) NOT NULL PRIMARY KEY, current INTEGER NOT NULL)",
    "CREATE TABLE profile_versions (name VARCHAR(64) NOT NULL REFERENCES profiles (name), version INTEGER NOT NULL,"
    " body TEXT NOT NULL, PRIMARY KEY (name, version))",
)
LATER = (
    *(sql.replace("(64) NOT NULL PRIMARY", "(128) NOT NULL PRIMARY") for sql in FIRST[:2]),
    FIRST[2].replace("name VARCHAR(64)", "name VARCHAR(128)"),
    "CREATE TABLE nameless_adapters (digest VARCHAR(64) NOT NULL PRIMARY KEY, name VARCHAR(128) NOT NULL,"
    " info TEXT NOT NULL, created VARCHAR(32) NOT NULL)",
    "CREATE TABLE scorecards (id {serial} NOT NULL PRIMARY KEY, digest VARCHAR(64) NOT NULL, body TEXT NOT NULL,"
    " created VARCHAR(32) NOT NULL)",
    "CREATE INDEX ix_scorecards_digest ON scorecards (digest)",
)
"""The tables of earlier versions, which had no migrations."""
BODY = {"recipe": "1*a", "parents": {"a": "d" * 64}, "digest": "e" * 64, "defaults": {}, "description": "ü"}
ROWS: dict[str, dict[str, object]] = {
    "adapters": {"name": "a", "digest": "d" * 64, "info": to_json(adapter_info(rank=4)), "created": CREATED},
    "nameless_adapters": {"name": "b", "digest": "b" * 64, "info": to_json(adapter_info()), "created": CREATED},
    "profiles": {"name": "p", "current": 1},
    "profile_versions": {"name": "p", "version": 1, "body": to_json({**BODY, "created": CREATED})},
    "scorecards": {"digest": "e" * 64, "body": "{}", "created": CREATED},
}


def read(url: str, query: str) -> list[tuple[object, ...]]:
    engine = create_engine(url)
    with engine.begin() as connection:
        rows = [tuple(row) for row in connection.execute(text(query))]
    engine.dispose()
    return rows


def insert(connection: Connection) -> dict[str, dict[str, object]]:
    """Insert those of `ROWS` that have a table, as earlier versions do; returns them."""
    held = {name: row for name, row in ROWS.items() if name in inspect(connection).get_table_names()}
    for name, row in held.items():
        values = ", ".join(f":{key}" for key in row)
        connection.execute(text(f"INSERT INTO {name} ({', '.join(row)}) VALUES ({values})"), row)
    return held


@pytest.mark.parametrize("tables", [(), FIRST, LATER], ids=["empty", "first", "later"])
def test_a_database_of_an_earlier_version_keeps_all_it_has(url: str, tables: tuple[str, ...]) -> None:
    engine = create_engine(url)
    serial = "SERIAL" if engine.dialect.name == "postgresql" else "INTEGER"
    with engine.begin() as connection:
        for sql in tables:
            connection.execute(text(sql.format(serial=serial)))
        held = insert(connection)
    for _ in range(2):  # the second start finds today's schema
        registry = Registry(url, timeout_s=5)
        fill(registry, AdapterRecord("x" * 128, "c" * 64, adapter_info(), CREATED))
        registry.close()
        with engine.connect() as connection:
            options = {
                "compare_type": url.startswith("postgres")
            }  # SQLite keeps lengths as they were, and ignores them
            assert compare_metadata(MigrationContext.configure(connection, opts=options), METADATA) == []
            for name, row in held.items():
                found = [dict(one) for one in connection.execute(text(f"SELECT * FROM {name}")).mappings()]
                kept = add_checksum(row) if "checksum" in found[0] else row
                assert any(kept.items() <= one.items() for one in found)
    engine.dispose()
    if "profiles" in held:
        assert registry.profiles["p"].description == "ü"
        assert registry.adapters["a"].rank == 4


def test_the_registry_of_an_earlier_commit_is_upgraded_and_loses_nothing(tmp_path: Path) -> None:
    shutil.copy(OLD, tmp_path / "registry.sqlite")
    with closing(sqlite3.connect(OLD)) as old:
        rows: dict[str, list[Any]] = {
            table: old.execute(f"SELECT * FROM {table}").fetchall() for table in ("adapters", "profile_versions")
        }
    registry = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}", timeout_s=5)
    try:
        assert {(r.name, r.digest) for r in registry.adapters.values()} == {row[:2] for row in rows["adapters"]}
        assert registry.profiles["balanced"].version == 1
        assert {n: v.body() for n, v in registry.versions["balanced"].items()} == {
            number: json.loads(body) for _, number, body in rows["profile_versions"]
        }
        assert registry.snapshot.scorecard_counts["1" * 64] == 1
        assert not registry.snapshot.damaged_adapters
    finally:
        registry.close()


def test_rows_that_replicas_of_an_earlier_version_still_insert_are_served(url: str) -> None:
    Registry(url, timeout_s=5).close()
    engine = create_engine(url)
    with engine.begin() as connection:
        insert(connection)
    engine.dispose()
    registry = Registry(url, timeout_s=5)
    registry.close()
    assert registry.profiles["p"].description == "ü"
    assert (registry.adapters["a"].rank, *registry.snapshot.nameless) == (4, "b" * 64)
    assert read(url, "SELECT checksum FROM adapters") == [(None,)]


def test_a_newer_database_is_refused_and_stays_as_it_is(url: str) -> None:
    Registry(url, timeout_s=5).close()
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    message = (
        r"belongs to a newer version: its schema is '9999', the newest that this version knows is '\d+'; start tha"
    )
    with pytest.raises(RuntimeError, match=message):
        Registry(url, timeout_s=5)
    engine.dispose()
    assert read(url, "SELECT version_num FROM alembic_version") == [("9999",)]


def test_a_migration_that_was_killed_half_way_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        migrate(connection)
    with closing(sqlite3.connect(path)) as file, file:  # SQLite commits each table by itself
        file.execute("UPDATE alembic_version SET version_num = '0001'")
        file.execute("DROP TABLE leases")
        file.execute("DELETE FROM registry")
    registry = Registry(f"sqlite:///{path}", timeout_s=5)
    registry.close()
    assert read(f"sqlite:///{path}", "SELECT id, changes FROM registry") == [(1, 0)]
    assert read(f"sqlite:///{path}", "SELECT count(*) FROM leases") == [(0,)]
    engine.dispose()


def test_servers_that_start_at_once_migrate_once(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "LOCK_WAIT_S", 5)
    with postgres.fresh() as url, ThreadPoolExecutor(6) as threads:
        for registry in list(threads.map(lambda _: Registry(url, timeout_s=5, shared=True), range(6))):
            registry.close()
        assert read(url, "SELECT count(*) FROM registry") == [(1,)]
