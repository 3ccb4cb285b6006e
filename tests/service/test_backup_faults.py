"""Backups and restorations of what is damaged, and those that are cut in the middle."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from service import backup
from service.backup_rows import insert_rows
from tests.service.test_backup import Use, open_registry, run, stock, use as use

ODD = [("bad text", b"{\xff}", "text"), ("bytes", b"\x00\xff", "blob"), ("text", b"plain", "text")]


def test_bytes_that_are_no_text_stop_no_backup_and_return_as_they_were(
    use: Use, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stock(use(tmp_path / "data")).close()
    with closing(sqlite3.connect(tmp_path / "data/registry.sqlite")) as file, file:
        for created, body, kind in ODD:
            row = "INSERT INTO scorecards (digest, body, created) VALUES ('odd', CAST(? AS {}), ?)"
            file.execute(row.format(kind), (body, created))
        file.execute("UPDATE adapters SET info = CAST(x'7bff7d' AS TEXT) WHERE name = 'a'")
    assert run("backup", tmp_path / "one") == 0
    said = capfd.readouterr().err
    assert said.count("in scorecards has bytes for text") == 2
    assert "the row of 'a' in adapters is damaged" in said
    target = use(tmp_path / "new")
    assert run("restore", tmp_path / "one") == 0, capfd.readouterr().err
    with closing(sqlite3.connect(target.data / "registry.sqlite")) as file:
        query = "SELECT created, CAST(body AS BLOB), typeof(body) FROM scorecards WHERE digest = 'odd' ORDER BY id"
        assert file.execute(query).fetchall() == ODD
        assert file.execute("SELECT CAST(info AS BLOB) FROM adapters WHERE name = 'a'").fetchone() == (b"{\xff}",)
    restored = open_registry(target)
    assert {*restored.snapshot.damaged_adapters} == {"a"}
    restored.close()


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_restoration_that_was_cut_can_be_repeated(
    use: Use, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_killed: bool
) -> None:
    stock(use(tmp_path / "data")).close()
    assert run("backup", tmp_path / "one.tar") == 0
    target, insert = use(tmp_path / "new"), insert_rows

    def fail(*args: Any) -> None:
        insert(*args)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as cut:
        cut.setattr(backup, "insert_rows", fail)
        if is_killed:  # nothing that would be cleared is
            cut.setattr(backup, "_remove_database", lambda _: None)
            cut.setattr(shutil, "rmtree", lambda *_, **__: None)
        assert run("restore", tmp_path / "one.tar") == 1
    assert not (target.data / "registry.sqlite").exists(), "a server would start without keys"
    assert run("restore", tmp_path / "one.tar") == 0
    restored = open_registry(target)
    assert {*restored.adapters} == {"a", "acme|b"}
    restored.close()
    assert not [path.name for path in target.data.iterdir() if "restor" in path.name]


def test_an_adapter_that_goes_while_it_is_copied_is_no_damage(
    use: Use, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = stock(use(tmp_path / "data"))
    digest = registry.adapters["acme|b"].digest
    copy: Callable[..., Any] = shutil.copy2

    def remove(source: os.PathLike[str], target: str) -> Any:
        if digest in os.fspath(source) and Path(source).exists():
            with closing(sqlite3.connect(tmp_path / "data/registry.sqlite")) as file, file:
                file.execute("DELETE FROM adapters WHERE name = 'acme|b'")
            shutil.rmtree(tmp_path / "data/adapters" / digest)
        return copy(source, target)

    monkeypatch.setattr(shutil.copytree, "__defaults__", (False, None, remove, False, False))
    assert run("backup", tmp_path / "one") == 0
    assert [path.name for path in (tmp_path / "one/adapters").iterdir()] == [registry.adapters["a"].digest]
    registry.close()


def test_an_archive_on_a_read_only_volume_is_restored(use: Use, tmp_path: Path) -> None:
    stock(use(tmp_path / "data")).close()
    (tmp_path / "volume").mkdir()
    assert run("backup", tmp_path / "volume/one.tar") == 0
    before = sorted((tmp_path / "volume").iterdir())
    stamp = (tmp_path / "volume").stat().st_mtime_ns
    use(tmp_path / "new")
    assert run("restore", tmp_path / "volume/one.tar") == 0
    assert (sorted((tmp_path / "volume").iterdir()), (tmp_path / "volume").stat().st_mtime_ns) == (before, stamp)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"adapters", "lock", "registry.sqlite"}
