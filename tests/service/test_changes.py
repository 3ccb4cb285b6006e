"""Changes at the same time: none is lost, none waits for another's build, and no files go while they are needed."""

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest

from adapters import AdapterError, fuse
from service import fuser
from service.errors import ApiError
from service.replicas import follow
from tests.service.conftest import World
from tests.service.shops import Shop
from tests.service.test_catalog import shop  # noqa: F401 - a fixture

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


@pytest.fixture
async def stocked(shop: Shop) -> Shop:  # noqa: F811 - a fixture
    for name in ("wide", "narrow"):
        await shop.catalog.add(name, shop.root / name)
    return shop


async def start(change: Any) -> "asyncio.Task[Any]":
    """`change` under way, as far as it gets while the engine loads nothing."""
    task = asyncio.create_task(change)
    await asyncio.sleep(0.3)
    assert not task.done()
    return task


async def test_nobody_waits_for_a_profile_that_is_being_made(stocked: Shop) -> None:
    goes_on = stocked.engine.hold()
    putting = await start(stocked.profiles.put("slow", "1*wide + 1*narrow"))
    async with asyncio.timeout(5):
        await stocked.profiles.put("quick", "2*wide")
        await stocked.profiles.rollback("quick", 1)
        await stocked.profiles.remove("quick")
        with pytest.raises(ApiError, match="There is no profile 'nobody'"):
            await stocked.profiles.remove("nobody")
    goes_on.set()
    version, new = await putting
    assert (version.version, new) == (1, True)


async def test_two_versions_at_once_are_both_written(stocked: Shop) -> None:
    goes_on = stocked.engine.hold()
    puts = [await start(stocked.profiles.put("even", f"{i}*wide + 1*narrow")) for i in (1, 2, 3)]
    goes_on.set()
    made = await asyncio.gather(*puts)
    assert sorted(version.version for version, _ in made) == [1, 2, 3]
    assert sum(new for _, new in made) == 1
    assert set(stocked.profiles.registry.versions["even"]) == {1, 2, 3}


async def test_a_name_that_is_taken_meanwhile_is_refused(stocked: Shop) -> None:
    goes_on = stocked.engine.hold()
    putting = await start(stocked.profiles.put("third", "1*wide + 1*narrow"))
    adding = await start(stocked.catalog.add("third", stocked.root / "third"))
    goes_on.set()
    outcomes = await asyncio.gather(putting, adding, return_exceptions=True)
    (error,) = [outcome for outcome in outcomes if isinstance(outcome, ApiError)]
    assert error.status == 409
    registry = stocked.profiles.registry
    assert ("third" in registry.profiles) + ("third" in registry.adapters) == 1
    assert {entry.key for entry in stocked.sources.entries()} == registry.needed_digests()


async def test_an_adapter_removed_under_a_profile_being_made_stays_until_that_is_refused(stocked: Shop) -> None:
    digest = stocked.catalog.registry.adapters["narrow"].digest
    goes_on = stocked.engine.hold()
    putting = await start(stocked.profiles.put("even", "1*wide + 1*narrow"))
    await stocked.catalog.remove("narrow")
    assert stocked.sources.get(digest) is not None
    goes_on.set()
    with pytest.raises(ApiError, match="There is no adapter 'narrow'"):
        await putting
    assert stocked.sources.get(digest) is None
    assert not stocked.profiles.registry.profiles


async def test_an_adapter_replaced_under_a_profile_being_made_is_noticed(stocked: Shop) -> None:
    goes_on = stocked.engine.hold()
    putting = await start(stocked.profiles.put("even", "1*wide + 1*narrow"))
    await stocked.catalog.remove("narrow")
    adding = await start(stocked.catalog.add("narrow", stocked.root / "third"))
    async with stocked.profiles.write_lock:
        goes_on.set()
        await asyncio.sleep(0.2)  # both are made, and write one after the other
    await adding
    with pytest.raises(ApiError) as caught:
        await putting
    assert caught.value.status in (404, 409)
    assert not stocked.profiles.registry.profiles
    assert {entry.key for entry in stocked.sources.entries()} == stocked.profiles.registry.needed_digests()


async def test_files_of_one_adapter_under_two_names_stay_while_the_second_is_added(stocked: Shop) -> None:
    digest = stocked.catalog.registry.adapters["narrow"].digest
    stocked.catalog.pool.forget(digest)
    goes_on = stocked.engine.hold()
    adding = await start(stocked.catalog.add("alias", stocked.root / "narrow"))
    await stocked.catalog.remove("narrow")
    goes_on.set()
    await adding
    assert stocked.sources.get(digest) is not None
    await stocked.catalog.remove("alias")
    assert stocked.sources.get(digest) is None


async def test_an_adapter_whose_row_is_damaged_under_a_server_keeps_its_files(stocked: Shop) -> None:
    registry, digest = stocked.profiles.registry, stocked.profiles.registry.adapters["wide"].digest
    await stocked.catalog.add("third", stocked.root / "third")
    third = registry.adapters["third"].digest
    service: Any = SimpleNamespace(
        registry=registry, files=stocked.profiles.files, pool=stocked.profiles.pool, metrics=stocked.profiles.metrics
    )

    async def reread(change: str) -> None:
        with closing(sqlite3.connect(stocked.root.parent / "registry.sqlite")) as database, database:
            database.execute(change)
        with pytest.raises(ZeroDivisionError):  # which closes the connection
            await registry.transact(lambda _: 1 // 0)
        await registry.settle()
        await asyncio.sleep(0.3)  # what is let go of goes in the background

    with follow(service):
        await reread("UPDATE adapters SET created = 'x' || created WHERE name = 'wide'")
        assert "wide" in registry.snapshot.damaged_adapters
        await reread("DELETE FROM adapters WHERE name = 'third'")
        assert stocked.sources.get(third) is not None, "the damaged row may have named it"
        await reread("UPDATE adapters SET created = substr(created, 2) WHERE name = 'wide'")
    assert stocked.sources.get(digest) is not None
    assert registry.adapters["wide"].digest == digest


async def test_of_two_additions_of_one_adapter_the_one_that_fails_takes_no_files_along(stocked: Shop) -> None:
    await stocked.catalog.remove("narrow")
    goes_on = stocked.engine.hold()
    adding = await start(stocked.catalog.add("third", stocked.root / "third"))
    going = await start(stocked.catalog.add("other", stocked.root / "third"))
    going.cancel()
    await asyncio.wait([going])
    goes_on.set()
    record, new = await adding
    assert new
    assert stocked.sources.get(record.digest) is not None
    stocked.engine.effect = 0
    with pytest.raises(AdapterError, match="no effect"):
        await stocked.catalog.add("other", stocked.root / "third")
    assert stocked.sources.get(record.digest) is not None


async def test_the_same_adapter_added_twice_at_once_is_new_once(stocked: Shop) -> None:
    goes_on = stocked.engine.hold()
    adding = [await start(stocked.catalog.add("third", stocked.root / "third")) for _ in range(2)]
    goes_on.set()
    assert sorted(new for _, new in await asyncio.gather(*adding)) == [False, True]


@pytest.mark.parametrize("method", ["add_adapter", "remove_adapter", "add_version", "set_current", "remove_profile"])
async def test_a_client_that_goes_while_its_change_is_written_cuts_nothing_in_two(
    stocked: Shop, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    await stocked.profiles.put("even", "1*wide")
    await stocked.profiles.put("even", "2*wide")
    registry, goes_on = stocked.profiles.registry, asyncio.Event()
    write = getattr(registry, method)

    async def write_slowly(*args: Any) -> Any:
        await goes_on.wait()
        return await write(*args)

    monkeypatch.setattr(registry, method, write_slowly)
    changes: dict[str, Callable[[], Any]] = {
        "add_adapter": lambda: stocked.catalog.add("third", stocked.root / "third"),
        "remove_adapter": lambda: stocked.catalog.remove("narrow"),
        "add_version": lambda: stocked.profiles.put("even", "3*wide"),
        "set_current": lambda: stocked.profiles.rollback("even", 1),
        "remove_profile": lambda: stocked.profiles.remove("even"),
    }
    going = await start(changes[method]())
    going.cancel()
    await asyncio.wait([going])
    assert stocked.catalog.write_lock.locked(), "the next change waits for this one"
    goes_on.set()
    await stocked.profiles.put("other", "4*wide")
    await asyncio.sleep(0.2)  # what was removed is deleted
    assert {entry.key for entry in stocked.sources.entries()} == registry.needed_digests()
    assert ("third" in registry.adapters, "narrow" in registry.adapters) == (
        method == "add_adapter",
        method != "remove_adapter",
    )
    assert len(registry.versions.get("even", {})) == {"add_version": 3, "remove_profile": 0}.get(method, 2)


async def test_a_change_that_waits_too_long_for_others_is_refused(stocked: Shop) -> None:
    object.__setattr__(stocked.catalog.settings, "wait_timeout_s", 0.1)
    async with stocked.catalog.write_lock:
        for change in (stocked.profiles.put("even", "1*wide"), stocked.catalog.remove("wide")):
            with pytest.raises(
                ApiError, match="Timed out after 0.1 s waiting for other changes of the registry"
            ) as caught:
                await change
            assert (caught.value.status, caught.value.headers["retry-after"]) == (503, "5")
    await stocked.profiles.put("even", "1*wide")


async def test_an_adapter_removed_under_a_build_is_read_to_the_end(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world()
    goes_on, begun = threading.Event(), threading.Event()

    def fuse_slowly(*args: Any, **options: Any) -> Any:
        begun.set()
        goes_on.wait(20)
        return fuse(*args, **options)

    monkeypatch.setattr(fuser, "fuse", fuse_slowly)
    digest = w.adapters["a"].digest
    asking = [asyncio.create_task(w.pool.acquire(w.fusion(f"svd({i}*a, rank=2)"))) for i in range(1, 7)]
    await asyncio.to_thread(begun.wait)
    w.removed.add(digest)
    w.pool.forget(digest)
    await w.files.delete_unneeded([digest])
    assert w.materializer.check(digest), "those in the queue have read nothing yet"
    goes_on.set()
    for task in asyncio.as_completed(asking):
        w.pool.release(await task)
    with pytest.raises(ApiError, match="are gone from the store"):
        w.materializer.source(digest)
