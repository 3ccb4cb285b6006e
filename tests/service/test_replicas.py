"""Replicas on one registry and one store: what one does the others see, what one suffers costs the others nothing."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from service import database, follower
from service.errors import ApiError
from service.registry import Registry
from service.snapshot import read_snapshot
from tests.service.databases import Postgres
from tests.service.replicas import Line, Replica, run_replica, until, write_samples

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]
TIES = "ties(0.6*a + 0.4*b, density=0.5)"


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    with postgres.fresh() as fresh:
        yield fresh


@pytest.fixture
async def pair(url: str, tmp_path: Path) -> AsyncIterator[tuple[Replica, Replica]]:
    write_samples(tmp_path / "root")
    async with run_replica(url, tmp_path, "one") as one, run_replica(url, tmp_path, "two") as two:
        yield one, two


def read_bytes(folder: Path) -> dict[str, str]:
    """A digest of every file under `folder`, by path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("notified", [True, False], ids=["notified", "asking"])
async def test_a_profile_that_one_switches_the_other_serves(
    url: str, tmp_path: Path, notified: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not notified:
        monkeypatch.setattr(follower, "hear_changes", lambda *_: asyncio.sleep(1000))
    write_samples(tmp_path / "root")
    async with run_replica(url, tmp_path, "one") as one, run_replica(url, tmp_path, "two") as two:
        await one.add("a")
        await one.add("b")
        for version, recipe in enumerate(("0.6*a + 0.4*b", "0.2*a + 0.8*b", TIES), 1):
            await one.profiles.put("p", recipe)
            await until(lambda version=version: two.serves("p") == version)  # type: ignore[misc]  # bound now
            assert two.names.profile("p").recipe == one.names.profile("p").recipe
            assert (await two.lease("p")).mode == (await one.lease("p")).mode
        await two.profiles.rollback("p", 1)
        await until(lambda: one.serves("p") == 1)
        await two.profiles.remove("p")
        await until(lambda: one.serves("p") == 0)


async def test_all_replicas_get_the_same_bytes_and_one_makes_them(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    await one.add("a")
    await two.add("b")
    await until(lambda: {"a", "b"} == one.registry.adapters.keys() == two.registry.adapters.keys())
    leases = await asyncio.gather(*(replica.lease(TIES) for replica in (one, two, one, two)))
    assert sorted({lease.source for lease in leases}) == ["built", "loaded"]
    for part in ("adapters", "builds"):
        first, second = read_bytes(one.data / part), read_bytes(two.data / part)
        shared = read_bytes(one.data.parent / "shared" / part)
        both = first.keys() & second.keys()  # each has probed the adapter that it registered
        assert len(both) >= 3
        assert all(first[path] == second[path] == shared[path] for path in both)


async def test_a_replica_that_dies_while_it_makes_something_keeps_nobody_waiting_for_long(
    pair: tuple[Replica, Replica], url: str
) -> None:
    one, two = pair
    for name in ("a", "b"):
        await one.add(name)
    key = one.pool.place(one.names.resolve_recipe(one.names.look_up(TIES).recipe)).key  # type: ignore[union-attr]  # no base
    engine = create_engine(url)
    with engine.begin() as connection:
        row = "INSERT INTO leases VALUES (:key, 'killed', now() + interval '1 second')"
        connection.execute(text(row), {"key": key})
        connection.execute(text("INSERT INTO leases VALUES ('old', 'killed', now() - interval '2 hours')"))
    await until(lambda: "b" in two.registry.adapters)
    began = time.monotonic()
    lease = await two.lease(TIES)
    assert lease.source == "built"
    assert 0.5 < time.monotonic() - began < 5
    assert (await one.lease(TIES)).source == "loaded"
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM leases")).scalar() == 0, "no row is left"
    engine.dispose()


async def test_a_lease_is_kept_as_long_as_its_holder_works(
    pair: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    from service import leases

    one, two = pair
    monkeypatch.setattr(leases, "RENEW_S", 0.1)
    monkeypatch.setattr(leases, "_UNTIL", text("now() + interval '0.5 seconds'"))
    async with AsyncExitStack() as stack:
        assert await stack.enter_async_context(one.builds.turn("0" * 64)) is None
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5), two.builds.turn("0" * 64):
                pytest.fail("both have the lease")
    async with asyncio.timeout(1), two.builds.turn("0" * 64) as path:
        assert path is None


async def test_a_replica_whose_database_is_gone_serves_what_it_knows_and_says_so(
    url: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    write_samples(tmp_path / "root")
    line = Line(url, tmp_path_factory.mktemp("line"))
    await line.mend()
    async with run_replica(url, tmp_path, "one") as one, run_replica(line.url, tmp_path, "two", timeout_s=1) as two:
        for name in ("a", "b"):
            await one.add(name)
        await one.profiles.put("p", "0.6*a + 0.4*b")
        await until(lambda: two.serves("p") == 1)
        await line.cut()
        await until(lambda: two.registry.outage is not None, 3)
        await one.profiles.put("p", TIES)
        assert (await two.lease("p")).mode == "mixed"  # what it knows
        assert (await two.lease(TIES)).source in ("built", "loaded")  # without a lease
        for change in (two.profiles.put("q", "1*a"), two.profiles.remove("p"), two.catalog.remove("a")):
            with pytest.raises(ApiError, match="database failed: .*; what it said last is served") as caught:
                await change
            assert caught.value.status == 503
            assert int(caught.value.headers["retry-after"]) > 0
        await line.mend()
        await until(lambda: two.registry.outage is None and two.serves("p") == 2, 5)
        await two.profiles.put("q", "1*a")
        await until(lambda: one.serves("q") == 1)
        await line.cut()


async def test_replicas_release_what_another_removes(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    for name in ("a", "b"):
        await one.add(name)
    await until(lambda: "b" in two.registry.adapters)
    await two.lease("a")
    await two.lease("0.5*a + 0.5*b")
    digest = one.registry.adapters["a"].digest
    assert len(two.engine.loaded) == 2
    assert (two.data / "adapters" / digest).exists()
    await one.catalog.remove("a")
    await until(lambda: not two.engine.loaded and not (two.data / "adapters" / digest).exists())
    with pytest.raises(ApiError, match="There is no model 'a'"):
        await two.lease("a")


async def test_changes_of_both_at_once_are_made_in_turn(pair: tuple[Replica, Replica], url: str) -> None:
    one, two = pair
    for name in ("a", "b"):
        await one.add(name)
    await two.registry.settle()

    async def put(replica: Replica, name: str, weight: int) -> int:
        return (await replica.profiles.put(name, f"{weight}*a + 1*b"))[0].version

    calls = [put(replica, name, weight) for weight in range(1, 9) for replica in pair for name in ("p", "q")]
    versions = await asyncio.gather(*calls)
    assert sorted(versions) == sorted([*range(1, 17)] * 2)
    for replica in pair:
        await replica.registry.settle()
    fresh = Registry(url, timeout_s=5, shared=True)
    assert one.registry.snapshot.versions == two.registry.snapshot.versions == fresh.versions
    assert one.registry.profiles == two.registry.profiles == fresh.profiles
    assert one.registry.snapshot.nbytes == two.registry.snapshot.nbytes == fresh.snapshot.nbytes
    fresh.close()


async def test_a_name_that_both_give_at_once_is_given_once(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    await asyncio.gather(one.add("a"), two.add("a"))  # as replicas do that start at once
    calls = (
        one.catalog.add("x", one.root / "b"),
        two.catalog.add("x", two.root / "c"),
        one.profiles.put("p", "1*a", only_new=True),
        two.profiles.put("p", "1*a", only_new=True),
    )
    first, second, *_ = await asyncio.gather(*calls, return_exceptions=True)
    (refused,) = [outcome for outcome in (first, second) if isinstance(outcome, BaseException)]
    assert isinstance(refused, ApiError)
    assert refused.status == 409
    for replica in pair:
        await replica.registry.settle()
        assert replica.serves("p") == 1
    assert one.registry.adapters == two.registry.adapters


async def test_a_change_without_its_turn_is_refused(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    await one.add("a")
    record = one.registry.adapters["a"]
    with pytest.raises(ApiError) as caught:
        await two.registry.add_adapter(record)  # as after a connection that was lost and made anew
    assert isinstance(caught.value.__cause__, Exception)
    assert "turn" in str(caught.value.__cause__)
    async with one.registry.change():
        with pytest.raises(ApiError, match="Another replica has been changing the registry"):
            async with two.registry.change():
                pytest.fail("both have the turn")
    async with two.registry.change():
        pass


async def test_a_replica_that_stands_still_loses_its_turn(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "TURN_IDLE_S", 1)
    frozen, other = (database.Database(url, timeout_s=5, shared=True) for _ in range(2))
    for each in (frozen, other):
        each.connect()
    assert frozen.take_turn()
    assert not other.take_turn()
    await asyncio.sleep(1.5)
    assert other.take_turn()
    with pytest.raises(SQLAlchemyError), frozen.transaction(5) as connection:  # it wakes, and writes
        frozen.record_change(connection)
    assert not frozen.has_turn
    other.give_turn()
    await asyncio.sleep(1.5)
    assert other.count_changes() == 0, "whoever has no turn may be idle"
    for each in (frozen, other):
        each.close()


async def test_a_snapshot_is_one_state_of_the_tables(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    await one.add("a")
    stop = asyncio.Event()

    async def put() -> None:
        while not stop.is_set():
            await one.profiles.put("p", "1*a")

    async def read() -> None:
        source = two.registry._database  # noqa: SLF001 - as `settle` reads it, more often
        for _ in range(100):
            snapshot, _ = await two.registry._run(lambda _: read_snapshot(source))  # noqa: SLF001
            assert not snapshot.damaged_profiles
        stop.set()

    await asyncio.gather(put(), read())


async def test_a_damaged_copy_is_replaced(pair: tuple[Replica, Replica]) -> None:
    one, two = pair
    for name in ("a", "b"):
        await one.add(name)
    await one.lease(TIES)
    await until(lambda: "b" in two.registry.adapters)
    for path in (one.data.parent / "shared/builds").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert (await two.lease(TIES)).source == "built"
    assert read_bytes(two.data / "builds").items() <= read_bytes(one.data / "builds").items()


async def test_a_server_alone_and_replicas_keep_each_other_out(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "LOCK_WAIT_S", 0.3)
    for first in (True, False):
        registry = Registry(url, timeout_s=5, shared=first)
        with pytest.raises(
            RuntimeError, match="another server uses the registry in .*, or set FUSION_STORE to the sam"
        ):
            Registry(url, timeout_s=5, shared=not first)
        registry.close()
