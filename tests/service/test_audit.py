"""The audit: every change is in it, with its change or not at all; what was done to it is found; nothing secret is."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from anyio.to_thread import run_sync

from service import audit, audit_file, follower
from service.audit import Actor, Entry, current_actor, describe_version, digest_text, read_entries, write_canonical
from service.audit_check import BrokenChainError, check_chain, merge, read_lines
from service.audit_cli import main
from service.errors import ApiError
from service.keys import write_token
from service.records import AdapterRecord, ProfileVersion, now
from service.registry import Registry
from service.scorecards import Scorecards
from service.settings import Settings
from tests.service.conftest import adapter_info
from tests.service.databases import Postgres
from tests.service.rings import make_keys

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]
SECRETS = ("Project Nightjar", "{{ nightjar_template }}", "nightjar stop", "nightjar description", "nightjar card")
WHO = Actor("vllm-1", "deployer", "acme", "192.0.2.7", "req-1")


@asynccontextmanager
async def opened(folder: Path, url: str = "", *, shared: bool = False) -> AsyncIterator[Registry]:
    url = url or f"sqlite:///{folder / 'registry.sqlite'}"
    registry = await run_sync(partial(Registry, url, timeout_s=5, shared=shared, folder=folder))
    try:
        yield registry
    finally:
        registry.close()


async def change_everything(registry: Registry) -> list[str]:
    """Make every kind of change; the API keys that were shown."""
    cards, keys = Scorecards(Settings(), registry, asyncio.Lock()), make_keys(registry, Settings())
    defaults = {"system": SECRETS[0], "chat_template": SECRETS[1], "stop": [SECRETS[2]], "max_tokens": 7}
    profile = ProfileVersion("p", 1, "1*a", {"a": "a" * 64}, "e" * 64, defaults, SECRETS[3], now())
    await registry.add_adapter(AdapterRecord("a", "a" * 64, adapter_info(rank=4), now()))
    await registry.add_adapter(AdapterRecord("a", "b" * 64, adapter_info(rank=2), now()))
    await registry.add_version(profile)
    await registry.add_version(ProfileVersion("p", 2, "2*a", {"a": "b" * 64}, "f" * 64, created=now()))
    await registry.set_current("p", 1)
    number = await cards.add("e" * 64, {"text": SECRETS[4]})
    await cards.remove("e" * 64, number)
    with pytest.raises(ApiError, match="no scorecards"):
        await cards.remove("e" * 64)
    await registry.remove_profile("p")
    await registry.remove_adapter("a")
    made = await keys.create("admin", label="first")
    rotated = await keys.rotate(made[0].id, timedelta(hours=1))
    await keys.revoke(made[0].id)
    return [write_token(*made), write_token(*rotated)]


ACTIONS = (
    *("adapter.add", "adapter.replace", "profile.put", "profile.put", "profile.rollback"),
    *("scorecard.add", "scorecard.remove", "profile.remove", "adapter.remove"),
    *("key.create", "key.rotate", "key.revoke"),
)


async def read_all(registry: Registry) -> dict[int, dict[str, Any]]:
    rows = await registry.transact(partial(read_entries, after=0, limit=10**6))
    return {row.id: row.to_dict() for row in rows}


async def read_file(folder: Path, count: int) -> dict[int, dict[str, Any]]:
    """The entries of the file once it has `count`."""
    while True:
        path = folder / "audit.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= count:
            return read_lines(lines, "audit.jsonl")
        await asyncio.sleep(0.01)


async def test_every_change_says_who_when_what_and_from_where(tmp_path: Path) -> None:
    current_actor.set(WHO)
    async with opened(tmp_path) as registry:
        tokens = await change_everything(registry)
        entries = await read_all(registry)
        assert await read_file(tmp_path, len(ACTIONS)) == entries
    bodies = [row["entry"] for row in entries.values()]
    assert tuple(body["action"] for body in bodies) == ACTIONS
    for body in bodies:
        assert body["by"] == {
            "key": WHO.key,
            "role": "deployer",
            "tenant": "acme",
            "address": "192.0.2.7",
            "request": "req-1",
        }
        assert body["time"] <= now()
    assert [bodies[1][side]["digest"] for side in ("before", "after")] == ["a" * 64, "b" * 64]
    assert [bodies[4][side]["version"] for side in ("before", "after")] == [2, 1]
    assert bodies[2]["before"] is bodies[7]["after"] is bodies[9]["before"] is None
    assert bodies[2]["after"]["defaults"]["max_tokens"] == 7
    assert bodies[2]["after"]["defaults"]["system"]["length"] == len(SECRETS[0])
    content = json.dumps(bodies)
    hidden = [*SECRETS, *(token[16:] for token in tokens)]
    assert not [secret for secret in hidden if secret.lower() in content.lower()]
    assert check_chain(entries).last == len(ACTIONS)


async def test_a_change_and_its_entry_come_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ApiError(500, "no room")

    async with opened(tmp_path) as registry:
        await registry.add_adapter(AdapterRecord("a", "a" * 64, adapter_info(), now()))
        with monkeypatch.context() as patch:
            patch.setattr(follower, "append_entry", fail)
            with pytest.raises(ApiError, match="no room"):
                await registry.remove_adapter("a")
        await registry.settle()
        assert "a" in registry.adapters
    async with opened(tmp_path) as registry:
        assert "a" in registry.adapters
        assert len(await read_all(registry)) == 1


def swap(rows: list[dict[str, Any]], i: int) -> None:
    rows[i], rows[i + 1] = rows[i + 1], rows[i]


def renumber(rows: list[dict[str, Any]], i: int) -> None:
    """Take an entry out, and give those after it new numbers."""
    del rows[i]
    for number, row in enumerate(rows, 1):
        row["id"] = row["entry"]["id"] = number


def rehash(rows: list[dict[str, Any]], i: int) -> None:
    """Change an entry, and give it the hash that it then has."""
    rows[i]["entry"]["by"]["key"] = "0" * 12
    rows[i]["hash"] = audit.hash_text(audit.write_canonical(rows[i]["entry"]))


def edit(rows: list[dict[str, Any]], i: int) -> None:
    rows[i]["entry"]["target"] += "x"


def move(rows: list[dict[str, Any]], i: int) -> None:
    """Exchange what two entries say, under their old numbers."""
    one, two = rows[i]["entry"], rows[i + 1]["entry"]
    for key in ("action", "target", "before", "after"):
        one[key], two[key] = two[key], one[key]


@pytest.mark.parametrize("damage", [swap, renumber, rehash, edit, move, lambda rows, i: rows.pop(i)])
@pytest.mark.parametrize("i", [0, 4, len(ACTIONS) - 2])
async def test_what_was_done_to_an_entry_is_found(
    tmp_path: Path, damage: Callable[[list[dict[str, Any]], int], object], i: int
) -> None:
    async with opened(tmp_path) as registry:
        await change_everything(registry)
        rows = list((await read_all(registry)).values())
    lines = [json.dumps(row) for row in rows]
    head = check_chain(read_lines(lines, "x")).head
    damage(rows, i)
    with pytest.raises(BrokenChainError):
        check_chain(read_lines([json.dumps(row) for row in rows], "x"), head=head)


async def test_an_end_that_was_cut_off_is_found_by_a_head_from_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with opened(tmp_path) as registry:
        await change_everything(registry)
        await read_file(tmp_path, len(ACTIONS))
    path = tmp_path / "audit.jsonl"
    assert main(["verify", str(path)]) == 0
    head = capsys.readouterr().out.splitlines()[-1].removeprefix("head: ")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    assert main(["verify", str(path)]) == 0, "by itself it is whole"
    assert main(["verify", str(path), "--head", head]) == 1
    assert "the end was cut off" in capsys.readouterr().err
    path.write_text("".join(lines))
    assert main(["verify", str(path), "--head", head]) == 0
    assert main(["verify", str(tmp_path / "missing")]) == 2


async def test_older_files_are_checked_together_with_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit_file, "FILE_BYTES", 3000)
    async with opened(tmp_path) as registry:
        for number in range(8):
            await registry.add_adapter(AdapterRecord(f"a{number}", "a" * 64, adapter_info(), now()))
        entries = await read_all(registry)
        while "a7" not in (tmp_path / "audit.jsonl").read_text():
            await asyncio.sleep(0.01)
    files = sorted(tmp_path.glob("audit.jsonl*"))
    assert 2 <= len(files) <= 1 + audit_file.OLD_FILES
    assert max(file.stat().st_size for file in files) <= 3000
    assert merge(read_lines(file.read_text().splitlines(), "x") for file in files) == entries
    assert main(["verify", *map(str, files)]) == 0
    assert main(["verify", str(files[0])]) == 1
    assert "is missing" in capsys.readouterr().err
    first = read_lines(files[0].read_text().splitlines(), "x")
    start = first[min(first)]["entry"]["previous"]
    assert main(["verify", str(files[0]), "--start", start]) == 0


async def test_the_file_goes_on_after_a_kill_a_full_disk_and_with_another_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    async with opened(tmp_path) as registry:
        for number in range(3):
            await registry.add_adapter(AdapterRecord(f"a{number}", "a" * 64, adapter_info(), now()))
        await read_file(tmp_path, 3)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1]) + lines[1][:50])  # killed while it wrote, or before
    async with opened(tmp_path) as registry:
        assert path.read_text() == "".join(lines)

        def fail(*args: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(audit_file.AuditFile, "_write", fail)
            await registry.add_adapter(AdapterRecord("b", "b" * 64, adapter_info(), now()))
            await registry.settle()
        await registry.add_adapter(AdapterRecord("c", "c" * 64, adapter_info(), now()))
        assert check_chain(await read_file(tmp_path, 5)).last == 5
    async with opened(tmp_path, f"sqlite:///{tmp_path / 'other.sqlite'}") as registry:
        await registry.add_adapter(AdapterRecord("z", "d" * 64, adapter_info(), now()))
        while not path.exists():
            await asyncio.sleep(0.01)
        assert check_chain(await read_file(tmp_path, 1)).last == 1
    assert len((tmp_path / "audit.jsonl.1").read_text().splitlines()) == 5


async def test_replicas_write_one_chain_and_each_has_all_of_it(tmp_path: Path, postgres: Postgres) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    with postgres.fresh() as url:
        async with opened(folders[0], url, shared=True) as one, opened(folders[1], url, shared=True) as two:
            for number in range(4):
                registry = (one, two)[number % 2]
                async with registry.change():
                    await registry.add_adapter(AdapterRecord(f"a{number}", "a" * 64, adapter_info(), now()))
            await one.settle()
            entries = await read_all(one)
            for folder in folders:
                assert await read_file(folder, 4) == entries
    assert check_chain(entries).last == 4


async def test_the_registry_keeps_the_newest_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MAX_ENTRIES", 3)
    async with opened(tmp_path) as registry:
        for number in range(5):
            await registry.add_adapter(AdapterRecord(f"a{number}", "a" * 64, adapter_info(), now()))
        entries = await read_all(registry)
        assert sorted(entries) == [3, 4, 5]
        assert check_chain(entries, start=entries[3]["entry"]["previous"]).last == 5
        assert check_chain(await read_file(tmp_path, 5)).head == entries[5]["hash"]


async def test_a_row_that_was_changed_in_the_database_is_found(tmp_path: Path) -> None:
    async with opened(tmp_path) as registry:
        await change_everything(registry)
    with closing(sqlite3.connect(tmp_path / "registry.sqlite")) as connection, connection:
        connection.execute("UPDATE audit SET body = replace(body, 'admin', 'owner') WHERE id = 10")
    async with opened(tmp_path) as registry:
        with pytest.raises(BrokenChainError, match="entry 10 was changed"):
            check_chain(await read_all(registry))


async def test_no_recipe_makes_a_line_longer_than_is_read_again() -> None:
    version = ProfileVersion("p", 1, " + ".join(f"0.01*{'a' * 120}{n}" for n in range(2000)), {}, "e" * 64)
    described = describe_version(version)
    assert described is not None
    assert described["recipe"] == digest_text(version.recipe)
    most = replace(version, recipe="\u2029" * audit.MAX_RECIPE)
    entry = Entry("profile.put", "t" * 200, describe_version(most), describe_version(most))
    assert len(write_canonical(asdict(entry))) < audit_file.LONGEST_LINE
