"""The registry on SQLite and on a real PostgreSQL: the same answers, kept across restarts, whatever happens below."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio
import pytest
from anyio.to_thread import run_sync
from sqlalchemy import Connection, create_engine, insert, text

from service import follower
from service.database import Database
from service.errors import ApiError
from service.records import AdapterRecord, ProfileVersion
from service.registry import Registry, to_json
from service.scorecards import Scorecards
from service.settings import Settings
from service.snapshot import Snapshot
from service.tables import ADAPTERS
from tests.service.conftest import adapter_info
from tests.service.databases import Postgres

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]
CREATED = "2026-01-01T00:00:00+00:00"
TIMEOUT_S = 1.0
STALLED_S = 6
"""The longest that a call may take over a stalled database: connecting takes 2 s, the rest its time-out."""


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Registry]:
    """A registry with a short time-out."""
    opened = await run_sync(partial(Registry, url, timeout_s=TIMEOUT_S))
    try:
        yield opened
    finally:
        opened.close()


def version(number: int, **changes: object) -> ProfileVersion:
    values = {"recipe": "1*a", "parents": {"a": "d" * 64}, "digest": "e" * 64, "defaults": {"stop": ["ü"]}}
    return ProfileVersion("p", number, **(values | changes), created=CREATED)  # type: ignore[arg-type]  # the values of all fields, mixed


async def test_everything_outlives_a_restart(url: str) -> None:
    async with opened(url) as first:
        await first.add_adapter(AdapterRecord("a", "d" * 64, adapter_info(rank=4), CREATED))
        for number in (1, 2, 3):
            await first.add_version(version(number, description=f"number {number}"))
        await first.set_current("p", 2)
        await Scorecards(Settings(), first, asyncio.Lock()).add("e" * 64, {"exact": 0.5})
        before = first.snapshot
    async with opened(url) as second:
        assert second.snapshot == before
        assert second.adapters["a"].rank == 4
        assert second.profiles["p"] == version(2, description="number 2")
        assert sorted(second.versions["p"]) == [1, 2, 3]
        assert second.pinning_profiles("d" * 64) == ["p"]
        cards = Scorecards(Settings(), second, asyncio.Lock())
        page, has_more = await cards.read("e" * 64, limit=10, after=0)
        assert ([card["exact"] for card in page], has_more) == ([0.5], False)
        await cards.remove("e" * 64)
        await second.remove_profile("p")
        await second.remove_adapter("a")
        assert second.snapshot == Snapshot()
    async with opened(url) as third:
        assert third.snapshot == Snapshot()


async def test_what_a_damaged_version_may_pin_outlives_other_profiles() -> None:
    snapshot = Snapshot()
    for name, digest in (("a", "d" * 64), ("b", "e" * 64)):
        snapshot.keep(AdapterRecord(name, digest, adapter_info(), CREATED))
    snapshot.add_version(replace(version(1), name="fine", parents={"a": "d" * 64}), 9)
    snapshot.damaged_versions["broken"] = {1: "no JSON"}
    snapshot.remove_profile("fine")
    assert snapshot.nameless.keys() == snapshot.ranks.keys() == {"e" * 64}
    snapshot.remove_profile("broken")
    assert snapshot == Snapshot()


async def test_a_registry_has_one_server(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "LOCK_WAIT_S", 0.5)
    async with opened(url):
        with pytest.raises(
            RuntimeError, match="another server uses the registry in '.*'; stop it, or set FUSION_DATABASE, or"
        ):
            async with opened(url):
                pass
    async with opened(url):
        pass


async def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "registry.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(RuntimeError, match=r"the registry in 'sqlite:.*' cannot be read: file is not a database"):
        Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}", timeout_s=5)
    with closing(sqlite3.connect(tmp_path / "schema.sqlite")) as file:
        file.execute("CREATE TABLE quite_a_long_name (x)")
    content = (tmp_path / "schema.sqlite").read_bytes()
    (tmp_path / "schema.sqlite").write_bytes(content.replace(b"TABLE quite", b"TAB\xff\xff quite"))
    with pytest.raises(RuntimeError, match=r"the registry in 'sqlite:.*' cannot be read: .*, or restore a backup"):
        Registry(f"sqlite:///{tmp_path / 'schema.sqlite'}", timeout_s=5)
    with pytest.raises(ValueError, match="cannot be kept in 'mysql': expected sqlite or postgresql"):
        Registry("mysql://somewhere/registry", timeout_s=5)


async def test_a_file_that_is_damaged_under_a_server_is_503_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    async with opened(f"sqlite:///{path}") as one:
        with pytest.raises(ZeroDivisionError):  # which closes the connection, and with it the file
            await one.transact(lambda _: 1 // 0)
        content = path.read_bytes()
        path.write_bytes(content.replace(b"CREATE TABLE adapters", b"CREATE TAB\xff\xff adapters"))
        await refused(one.settle())
        path.write_bytes(content)
        await settle(one)
        await one.add_version(version(1))


async def refused(call: object) -> float:
    """Seconds until `call` was answered 503 with Retry-After."""
    start = time.monotonic()
    with pytest.raises(ApiError) as caught:
        await call  # type: ignore[misc]  # a coroutine
    assert caught.value.status == 503
    assert int(caught.value.headers["retry-after"]) > 0
    return time.monotonic() - start


async def settle(one: Registry) -> None:
    """Have the registry find its database again, as `watch` does."""
    while True:
        try:
            return await one.settle()
        except ApiError:
            await anyio.sleep(0.2)


async def test_a_stalled_database_ends_every_call_and_its_thread(postgres: Postgres) -> None:
    async with opened(postgres.url) as one:
        cards = Scorecards(Settings(), one, asyncio.Lock())
        with postgres.stalled():
            for _ in range(2):  # the second finds no connection
                for call in (one.settle(), one.add_version(version(1)), cards.read("e" * 64, limit=1, after=0)):
                    assert await refused(call) < STALLED_S
            async with anyio.create_task_group() as group:
                for _ in range(100):  # more than may wait
                    group.start_soon(refused, one.settle())
        await settle(one)
        assert await cards.read("e" * 64, limit=1, after=0) == ([], False)


async def test_a_write_that_was_refused_and_comes_true_later_is_found(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = AdapterRecord("late", "d" * 64, adapter_info(), CREATED)
    row = {"name": "late", "digest": record.digest, "info": to_json(record.info), "created": CREATED}

    async with opened(postgres.url) as one:
        with ExitStack() as stall:

            def record_change(database: Database, connection: Connection) -> int:
                changes = count(database, connection)
                stall.enter_context(postgres.stalled())  # so that nothing answers the commit
                return changes

            count = Database.record_change
            monkeypatch.setattr(Database, "record_change", record_change)
            write = insert(ADAPTERS).values(row)
            assert (
                await refused(
                    one.write(lambda c: c.execute(write), lambda _: one.snapshot.add_adapter(record), lambda _: None)
                )
                < STALLED_S
            )
            assert not one.is_current
            assert "late" not in one.adapters
            await refused(one.add_version(version(1)))
        monkeypatch.undo()
        await settle(one)
        assert one.adapters == {"late": record}
        await one.remove_adapter("late")


async def test_a_write_ends_where_its_table_is_locked(postgres: Postgres) -> None:
    engine = create_engine(postgres.url)
    async with opened(postgres.url) as one:
        with engine.begin() as other:
            other.execute(text("LOCK TABLE adapters IN ACCESS EXCLUSIVE MODE"))
            assert await refused(one.remove_adapter("nobody")) < STALLED_S
        await settle(one)
        await one.remove_adapter("nobody")
    engine.dispose()


async def test_a_lost_connection_is_made_anew_with_its_lock(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "LOCK_WAIT_S", 0.5)
    engine = create_engine(postgres.url)
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'lora-fusion'"
    async with opened(postgres.url) as one:
        with engine.connect() as other:
            other.execute(text(end))
        await one.settle()
        with pytest.raises(RuntimeError, match="another server uses the registry"):
            async with opened(postgres.url):
                pass
        with engine.connect() as other:
            other.execute(text(end))
        await anyio.sleep(0.2)
        async with opened(postgres.url) as other_server:
            await refused(one.remove_adapter("nobody"))
            message = "in use by another server"
            with pytest.raises(ApiError, match=message):
                await one.settle()
            await other_server.remove_adapter("nobody")
        await settle(one)
    engine.dispose()


async def test_a_database_that_is_not_there_is_503_at_once(postgres: Postgres) -> None:
    with pytest.raises(RuntimeError, match="cannot be read: .*refused"):
        Registry("postgresql+psycopg://nobody@127.0.0.1:1/none", timeout_s=5)


async def test_a_locked_file_ends_every_write(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    async with opened(f"sqlite:///{path}") as one:
        with closing(sqlite3.connect(path)) as other:
            other.execute("BEGIN EXCLUSIVE")
            assert await refused(one.add_version(version(1))) < STALLED_S
            other.rollback()
        await settle(one)
        await one.add_version(version(1))


async def test_scorecards_are_changed_one_at_a_time_and_a_failed_read_changes_nothing(tmp_path: Path) -> None:
    async with opened(f"sqlite:///{tmp_path / 'registry.sqlite'}") as one:
        lock = asyncio.Lock()
        cards = Scorecards(Settings(wait_timeout_s=0.05), one, lock)
        async with lock:
            for change in (cards.add("e" * 64, {}), cards.remove("e" * 64)):
                with pytest.raises(ApiError, match="waiting for other changes of the registry"):
                    await change
        assert await cards.add("e" * 64, {"exact": 1}) == 1
        with pytest.raises(ZeroDivisionError):
            await one.transact(lambda _: 1 // 0)
        await one.settle()
        assert one.is_current
        assert (await cards.read("e" * 64, limit=1, after=0))[0][0]["exact"] == 1
