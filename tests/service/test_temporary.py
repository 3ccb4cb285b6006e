"""The server's temporary folder: deleted at the end, and by the next server after a kill."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service import temporary
from service.__main__ import main
from service.settings import START_FAILURE
from service.temporary import hold_temporary_folder
from tests.conftest import ROOT

HOLD = """
import time
from service.temporary import hold_temporary_folder
with hold_temporary_folder() as folder:
    (folder / "socket").touch()
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(temporary, "MAX_PARENT", 200)
    return tmp_path


def hold(parent: Path) -> subprocess.Popen[str]:
    """A process that holds a folder of its own."""
    code = f"from service import temporary; temporary.MAX_PARENT = 200\n{HOLD}"
    environment = {**os.environ, "TMPDIR": str(parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_nothing_stays_of_a_server_that_ends(parent: Path) -> None:
    with hold_temporary_folder() as folder:
        (folder / "left").mkdir()
        assert folder.parent == parent
    assert not list(parent.iterdir())


def test_the_folders_of_killed_servers_are_deleted_and_those_in_use_are_not(parent: Path) -> None:
    killed, running = hold(parent), hold(parent)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    try:
        with hold_temporary_folder() as folder:
            others = [path for path in parent.iterdir() if path != folder]
            assert len(others) == 1
            assert (others[0] / "socket").exists()
    finally:
        running.kill()
        running.wait()


def test_what_another_program_calls_alike_is_left_alone(parent: Path) -> None:
    (parent / "fusion-file").touch()
    (parent / "fusion-folder").mkdir()
    target = parent / "target"
    target.mkdir()
    (target / temporary.LOCK).touch()
    (parent / "fusion-link").symlink_to(target)
    with hold_temporary_folder():
        pass
    assert {path.name for path in parent.iterdir()} == {"fusion-file", "fusion-folder", "fusion-link", "target"}
    assert (target / temporary.LOCK).exists()


def test_sockets_fit_however_long_the_usual_folder_s_path_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(long))
    with hold_temporary_folder() as folder:
        assert len(f"{folder}/{'0' * 36}") < 107


@pytest.mark.parametrize("obstacle", ["a file", "what cannot be deleted"])
def test_a_data_folder_that_cannot_be_written_is_named_in_one_line(
    obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    if obstacle == "a file":
        data.touch()
    else:
        (data / START_FAILURE).mkdir(parents=True)
    monkeypatch.setenv("FUSION_DATA", str(data))
    assert main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: FUSION_DATA={str(data)!r} cannot be written: ")
    assert said.count("\n") == 1
