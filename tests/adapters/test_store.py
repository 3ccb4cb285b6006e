"""The store: a landed folder is whole whatever is killed when, and room is made in order of use."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from adapters import Store

K = [f"{digit}" * 16 for digit in "0123456789"]


def land(store: Store, key: str, size: int = 10) -> Path:
    def write(folder: Path) -> None:
        (folder / "data").write_bytes(b"x" * size)

    return store.land(key, write)


def test_what_lands_is_there_and_is_written_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", budget_bytes=100)
    assert store.get(K[1]) is None
    path = land(store, K[1])
    assert path == store.get(K[1]) == land(store, K[1], size=99)
    assert (path / "data").read_bytes() == b"x" * 10
    assert [(e.key, e.bytes) for e in store.entries()] == [(K[1], 10)]
    assert store.nbytes == 10
    assert Store(tmp_path / "store", budget_bytes=100).get(K[1]) == path


def test_landing_is_one_rename_of_the_folder_that_was_filled(tmp_path: Path) -> None:
    store = Store(tmp_path, budget_bytes=100)
    filled: list[int] = []

    def write(folder: Path) -> None:
        (folder / "data").write_text("x")
        filled.append(folder.stat().st_ino)

    assert [store.land(K[1], write).stat().st_ino] == filled


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path, budget_bytes=100)

    def broken(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        store.land(K[1], broken)
    with pytest.raises(ValueError, match="nothing was written"):
        store.land(K[1], lambda folder: None)
    assert list(tmp_path.iterdir()) == []
    assert store.get(K[1]) is None


def test_two_landers_of_one_key_are_both_served(tmp_path: Path) -> None:
    store = Store(tmp_path, budget_bytes=100)
    both = threading.Barrier(2, timeout=20)
    found: list[bytes] = []

    def lander(mark: bytes) -> None:
        def write(folder: Path) -> None:
            both.wait()
            (folder / "data").write_bytes(mark)

        found.append((store.land(K[1], write) / "data").read_bytes())

    threads = [threading.Thread(target=lander, args=(mark,)) for mark in (b"one", b"two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert set(found) <= {b"one", b"two"}
    assert [path.name for path in tmp_path.iterdir()] == [K[1]]


def test_eviction_goes_by_last_use_and_spares_those_to_keep(tmp_path: Path) -> None:
    store = Store(tmp_path, budget_bytes=35)
    for age, key in enumerate(K[1:5]):
        path = land(store, key)
        os.utime(path, (1000 + age, 1000 + age))
    assert [entry.key for entry in store.entries()] == K[1:5]
    assert store.get(K[1]) is not None
    assert store.evict(keep={K[2]}) == [K[3]]
    assert store.evict(keep=set()) == []
    assert store.evict(keep={K[2]}, need=15) == [K[4]]
    assert store.evict(keep={K[2]}, need=1000) == [K[1]]
    assert [entry.key for entry in store.entries()] == [K[2]]


def test_remove_is_complete_and_repeatable(tmp_path: Path) -> None:
    store = Store(tmp_path, budget_bytes=100)
    land(store, K[1])
    store.remove(K[1])
    store.remove(K[1])
    assert store.get(K[1]) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["", "abc", "g" * 16, "A" * 16, "../" + "a" * 16, "a" * 65, "a" * 16 + "\n", "a/" * 9])
def test_only_digests_are_keys(tmp_path: Path, key: str) -> None:
    store = Store(tmp_path, budget_bytes=1)
    for use in (store.get, store.remove, lambda key: land(store, key)):
        with pytest.raises(ValueError, match="store key"):
            use(key)


def test_a_negative_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="-1"):
        Store(tmp_path, budget_bytes=-1)


KILLED = """
import sys, time
from pathlib import Path
from adapters.files.store import Store

def write(folder):
    for part in range(3):
        (folder / str(part)).write_text("whole")
        print(part, flush=True)
        time.sleep(0 if part < int(sys.argv[3]) else 60)

Store(sys.argv[1], budget_bytes=1).land(sys.argv[2], write)
print("landed", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("pause", "after"), [(0, "0"), (2, "2"), (9, "landed")])
def test_a_killed_lander_never_shows_half_a_folder(tmp_path: Path, pause: int, after: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), K[7], str(pause)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    while child.stdout.readline().strip() != after:
        assert child.poll() is None
    during = Store(tmp_path, budget_bytes=1)
    leftovers = [path.name for path in tmp_path.iterdir() if path.name != K[7]]
    assert len(leftovers) == (0 if after == "landed" else 1), "a living lander's scratch folder stays"
    child.send_signal(signal.SIGKILL)
    child.wait()
    if after == "landed":
        path = during.get(K[7])
        assert path is not None
        assert sorted(os.listdir(path)) == ["0", "1", "2"]
    else:
        assert during.get(K[7]) is None
        assert during.entries() == []
    Store(tmp_path, budget_bytes=1)
    assert [path.name for path in tmp_path.iterdir()] == ([K[7]] if after == "landed" else [])


def test_old_leftovers_are_removed_whoever_owns_them(tmp_path: Path) -> None:
    own = tmp_path / f".landing-ffffffff-{os.getpid()}-0123456789abcdef"
    own.mkdir()
    Store(tmp_path, budget_bytes=1)
    assert own.exists(), "another host's young scratch folder stays"
    os.utime(own, (time.time() - 3700,) * 2)
    Store(tmp_path, budget_bytes=1)
    assert not own.exists()
