"""Backup and restore: everything a server keeps, from any database to any, whole or not at all."""

import asyncio
import gzip
import io
import json
import shutil
import sqlite3
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import func, select

from adapters import Store
from service.audit import read_entries
from service.backup import MANIFEST, ROWS
from service.backup_cli import main
from service.key_ring import KeyRing
from service.keys import Keys
from service.materializer import Materializer
from service.records import AdapterRecord, ProfileVersion
from service.registry import Registry
from service.remote_stores import open_shared_store
from service.scorecards import Scorecards
from service.settings import Settings
from service.tables import ADAPTERS
from tests.adapters import samples
from tests.service.conftest import adapter_info, fill
from tests.service.databases import Postgres

CREATED = "2026-01-01T00:00:00+00:00"


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "sqlite":
        yield ""
    else:
        postgres: Postgres = request.getfixturevalue("postgres")
        with postgres.fresh() as fresh:
            yield fresh


Use = Callable[..., Settings]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Has the commands use these settings from now on."""

    def set_all(data: Path, database: str = "", store: str = "") -> Settings:
        for name, value in (("DATA", str(data)), ("DATABASE", database), ("STORE", store)):
            monkeypatch.setenv(f"FUSION_{name}", value)
        return Settings(data=data, database=database, store=store)

    return set_all


def open_registry(settings: Settings) -> Registry:
    return Registry(settings.registry_url, timeout_s=5)


def stock(settings: Settings) -> Registry:
    """A registry that is open, as a server's is, with two adapters' files, a profile, and a scorecard."""
    settings.data.mkdir(exist_ok=True)
    registry = open_registry(settings)
    store = open_shared_store(settings, settings.data) or Store(settings.data / "adapters", budget_bytes=2**40)
    materializer = Materializer(store, 16)
    for seed, name in enumerate("ab"):
        adapter = samples.adapter(seed, 2)
        materializer.add(adapter)
        fill(
            registry, AdapterRecord(name, adapter.digest, adapter_info(rank=2), CREATED, "acme" if name == "b" else "")
        )
    parents = {"a": registry.adapters["a"].digest}
    fill(registry, ProfileVersion("p", 1, "1*a", parents, "c" * 64, {"system": "Be ü."}, "first", CREATED))
    asyncio.run(Scorecards(settings, registry, asyncio.Lock()).add("c" * 64, {"harm": 0.5}))
    return registry


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["backup", "backup.tar"])
def test_what_a_running_server_has_is_there_again_in_another_place(
    use: Use, tmp_path: Path, database: str, name: str, postgres: Postgres, capfd: pytest.CaptureFixture[str]
) -> None:
    registry = stock(use(tmp_path / "data", database))
    try:
        assert run("backup", tmp_path / name) == 0
    finally:
        expected = registry.snapshot
        identity = registry.identity
        registry.close()
    with postgres.fresh() as other:  # from either database to the other one
        target = use(tmp_path / "new", "" if database else other)
        assert run("restore", tmp_path / name) == 0, capfd.readouterr().err
        restored = open_registry(target)
        found = restored.snapshot
        assert (found.adapters, found.profiles, found.versions) == (
            expected.adapters,
            expected.profiles,
            expected.versions,
        )
        assert (found.scorecard_counts, restored.identity) == (expected.scorecard_counts, identity)
        digests = {record.digest for record in found.adapters.values()}
        assert {path.name for path in (tmp_path / "new/adapters").iterdir()} == digests
        asyncio.run(Scorecards(target, restored, asyncio.Lock()).add("c" * 64, {"harm": 0.25}))  # ids go on
        restored.close()
        with_key = json.loads((tmp_path / name / MANIFEST).read_text()) if name == "backup" else {}
        assert "lf-" not in str(with_key)


def test_nothing_is_ever_overwritten(use: Use, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stock(use(tmp_path / "data")).close()
    assert run("backup", tmp_path / "one") == 0
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run("backup", tmp_path / "one") == 1
    assert "exists; nothing is overwritten" in capfd.readouterr().err
    assert run("restore", tmp_path / "one") == 1
    assert "is not empty; nothing is overwritten" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("part", [ROWS, "adapters", MANIFEST])
def test_a_backup_with_a_changed_bit_is_not_restored(
    use: Use, tmp_path: Path, part: str, capfd: pytest.CaptureFixture[str]
) -> None:
    stock(use(tmp_path / "data")).close()
    assert run("backup", tmp_path / "one") == 0
    path = tmp_path / "one" / part
    path = next(path.rglob("*.safetensors")) if path.is_dir() else path
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if part != MANIFEST else 0] ^= 1
    path.write_bytes(content)
    target = use(tmp_path / "new")
    assert run("restore", tmp_path / "one") == 1
    assert (
        "not as they were written" in (err := capfd.readouterr().err) or "is not as it" in err or "not a backup" in err
    )
    assert not (target.data / "registry.sqlite").exists()


def test_an_adapter_whose_files_are_damaged_stops_a_backup(
    use: Use, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    registry = stock(use(tmp_path / "data"))
    digest = registry.adapters["a"].digest
    registry.close()
    shutil.rmtree(tmp_path / "data/adapters" / digest)
    assert run("backup", tmp_path / "one") == 1
    assert f"the files of adapter {digest} are not whole" in capfd.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"data"}  # nothing half-done is left


def test_a_backup_of_a_newer_version_is_refused(use: Use, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stock(use(tmp_path / "data")).close()
    assert run("backup", tmp_path / "one") == 0
    manifest = json.loads((tmp_path / "one" / MANIFEST).read_text())
    (tmp_path / "one" / MANIFEST).write_text(json.dumps({**manifest, "schema": "9999"}))
    use(tmp_path / "new")
    assert run("restore", tmp_path / "one") == 1
    assert "is of a newer version: its schema is '9999'" in capfd.readouterr().err


def test_what_is_no_backup_is_refused(use: Use, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    use(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    with tarfile.open(tmp_path / "other.tar", "w"):
        pass
    (tmp_path / "text.tar").write_text("x")
    for name in ("empty", "other.tar", "text.tar", "missing"):
        assert run("restore", tmp_path / name) == 1
        assert capfd.readouterr().err.startswith("error: ")
    assert run("backup", tmp_path / "one") == 1
    assert "no registry found at" in capfd.readouterr().err


def test_a_key_that_was_revoked_after_the_backup_is_told(
    use: Use, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = use(tmp_path / "data")
    registry = stock(settings)
    keys = Keys(settings, registry, asyncio.Lock(), KeyRing(registry))
    ids = [asyncio.run(keys.create("admin"))[0].id for _ in range(2)]
    asyncio.run(keys.revoke(ids[0]))
    assert run("backup", tmp_path / "one") == 0
    asyncio.run(keys.revoke(ids[1]))
    registry.close()
    target = use(tmp_path / "new")
    assert run("restore", tmp_path / "one") == 0
    assert "1 API keys open this registry: revoke those again that have been" in capfd.readouterr().err
    restored = open_registry(target)
    entry = asyncio.run(restored.transact(lambda c: read_entries(c, after=0, limit=1, newest=True)))[0].to_dict()[
        "entry"
    ]
    assert (entry["action"], entry["by"]["role"]) == ("registry.restore", "operator")
    states = {id_: key.find_state("2026-01-01") for id_, key in restored.snapshot.keys.items()}
    assert states == {ids[0]: "revoked", ids[1]: "active"}
    restored.close()


@pytest.mark.parametrize("kind", ["link", "hard link", "device", "sparse", "compressed", "outside"])
def test_an_archive_that_no_backup_has_written_is_not_unpacked(
    use: Use, tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    stock(use(tmp_path / "data")).close()
    assert run("backup", tmp_path / "one.tar") == 0
    member = tarfile.TarInfo({"outside": "../../escaped"}.get(kind, "backup/odd"))
    types = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
    member.type, member.linkname = types.get(kind, tarfile.REGTYPE), "/etc"
    if kind == "sparse":
        member.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**40)}
    with tarfile.open(tmp_path / "one.tar", "a", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member, io.BytesIO(b""))
    if kind == "compressed":
        (tmp_path / "one.tar").write_bytes(gzip.compress((tmp_path / "one.tar").read_bytes()))
    use(tmp_path / "new")
    before = sorted(tmp_path.rglob("*"))
    assert run("restore", tmp_path / "one.tar") == 1
    assert "\nerror: " in capfd.readouterr().err
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.parent != tmp_path / "new"]
    assert left in ([], [tmp_path / "new"])


def test_replicas_files_come_from_their_shared_place_and_return_to_one(
    use: Use, tmp_path: Path, postgres: Postgres
) -> None:
    with postgres.fresh() as first, postgres.fresh() as second:
        registry = stock(use(tmp_path / "data", first, str(tmp_path / "shared")))
        digests = {record.digest for record in registry.adapters.values()}
        registry.close()
        shutil.rmtree(tmp_path / "data")  # the shared place alone has them
        assert run("backup", tmp_path / "one") == 0
        use(tmp_path / "new", second, str(tmp_path / "other"))
        assert run("restore", tmp_path / "one") == 0
        assert {path.name for path in (tmp_path / "other/adapters").iterdir()} >= digests


def test_a_backup_of_rows_without_checksums_is_restored_with_them(use: Use, tmp_path: Path, database: str) -> None:
    stock(use(tmp_path / "data")).close()
    with closing(sqlite3.connect(tmp_path / "data/registry.sqlite")) as file, file:  # as the version before has it
        for table in ("adapters", "nameless_adapters", "profile_versions"):
            file.execute(f"ALTER TABLE {table} DROP COLUMN checksum")
        file.execute("UPDATE alembic_version SET version_num = '0005'")
    assert run("backup", tmp_path / "one") == 0
    target = use(tmp_path / "new", database)
    assert run("restore", tmp_path / "one") == 0
    restored = open_registry(target)
    assert (*restored.adapters, *restored.profiles) == ("a", "acme|b", "p")
    assert asyncio.run(restored.transact(lambda c: c.execute(select(func.count(ADAPTERS.c.checksum))).scalar())) == 2
    restored.close()


def test_damaged_rows_stop_no_backup_and_are_as_damaged_after_it(
    use: Use, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stock(use(tmp_path / "data")).close()
    with closing(sqlite3.connect(tmp_path / "data/registry.sqlite")) as file, file:
        file.execute("UPDATE adapters SET digest = '000' || substr(digest, 4) WHERE name = 'acme|b'")
        file.execute("UPDATE profile_versions SET body = replace(body, '1*a', '3*a')")
        file.execute("INSERT INTO profile_versions VALUES ('p', 2, '{', NULL)")
    assert run("backup", tmp_path / "one") == 0
    said = capfd.readouterr().err
    assert "the row of 'acme|b' in adapters is damaged: it is not as it was written" in said
    assert said.count("the row of 'p' in profile_versions is damaged") == 2
    target = use(tmp_path / "new")
    assert run("restore", tmp_path / "one") == 0
    restored = open_registry(target)
    assert (*restored.adapters, *restored.profiles) == ("a",)
    assert {*restored.snapshot.damaged_adapters, *restored.snapshot.damaged_profiles} == {"acme|b", "p"}
    restored.close()


def test_help_says_what_each_command_does(capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("backup", "restore"):
        with pytest.raises(SystemExit) as end:
            run(command, "--help")
        assert end.value.code == 0
        assert "FUSION_DATABASE" in capfd.readouterr().out
