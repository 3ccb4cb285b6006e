"""Landing folders: whole or not at all, whatever fails and whoever is first."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapters import did_you_mean
from adapters.files import atomic_folder, land_folder
from adapters.files.landing import remove_stale


def fill(folder: Path, content: str = "new") -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "data").write_text(content)


def test_a_folder_appears_when_its_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with atomic_folder(out) as folder:
        fill(folder)
        assert not out.exists()
        assert folder.parent == out.parent
    assert (out / "inner" / "data").read_text() == "new"
    assert os.listdir(out.parent) == ["out"]


def test_a_folder_lands_with_the_permissions_of_an_ordinary_one(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        fill(folder)
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_is_taken_is_refused_before_any_work(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "mine").touch()
    elif kind == "file":
        out.touch()
    else:
        out.symlink_to(tmp_path / "nowhere")
    for replace in (False, True) if kind != "folder" else (False,):
        with pytest.raises(FileExistsError, match="'.*out' already exists"), atomic_folder(out, replace=replace):
            pytest.fail("the block ran")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("replace", [False, True])
def test_an_empty_folder_is_taken_over(tmp_path: Path, replace: bool) -> None:
    with atomic_folder(tmp_path / "out", replace=replace) as folder:
        fill(folder)
        (tmp_path / "out").mkdir()
    assert (tmp_path / "out" / "inner" / "data").exists()


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with atomic_folder(out, replace=True) as folder:
        fill(folder)
        assert (out / "old").exists()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["inner"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_everything_as_it_was(tmp_path: Path, replace: bool, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    if replace:
        out.mkdir()
        (out / "old").touch()
    with pytest.raises(error), atomic_folder(out, replace=replace) as folder:
        fill(folder)
        raise error
    assert os.listdir(tmp_path) == (["out"] if replace else [])
    assert not replace or os.listdir(out) == ["old"]


def test_a_replacement_that_cannot_be_renamed_puts_the_old_folder_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(OSError, match="No such file"):
        land_folder(tmp_path / "nowhere", out, replace=True)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["old"]


def test_of_two_landers_the_first_wins(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileExistsError), atomic_folder(out) as slow:
        with atomic_folder(out) as quick:
            fill(quick, "first")
        fill(slow, "second")
    assert (out / "inner" / "data").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)), atomic_folder(tmp_path / "out") as folder:
            (folder / "data").write_bytes(bytes(8192))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_links_and_pipes_do_not_stop_the_sync(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "link").symlink_to("nowhere")
        os.mkfifo(folder / "pipe")
    assert sorted(os.listdir(tmp_path / "out")) == ["link", "pipe"]


KILLED = """
import sys, time
from pathlib import Path
from adapters.files import atomic_folder

with atomic_folder(Path(sys.argv[1]), replace=True) as folder:
    (folder / "half").touch()
    print("half", flush=True)
    time.sleep(60)
"""


def test_a_killed_lander_leaves_the_old_folder_and_a_scratch_folder_that_can_be_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "half\n"
    remove_stale(tmp_path)
    assert len(os.listdir(tmp_path)) == 2, "its owner is alive"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert os.listdir(out) == ["old"]
    remove_stale(tmp_path)
    assert os.listdir(tmp_path) == ["out"]


def test_the_nearest_name_is_hinted() -> None:
    assert did_you_mean("saftey", ["task", "safety"]) == "did you mean 'safety'?"
    assert did_you_mean("zebra", ["task", "safety"]) == did_you_mean("task", []) == ""


def test_a_hint_takes_no_time_for_long_names_and_many() -> None:
    began = time.monotonic()
    assert did_you_mean("a" * 100_000, ["a" * 99_999]) == ""
    did_you_mean("a" * 100, (f"{'a' * 90}{i}" for i in range(10**6)))
    assert time.monotonic() - began < 5
