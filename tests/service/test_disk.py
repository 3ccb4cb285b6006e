"""Files: a full disk makes room from old builds, and what fails or is given up leaves nothing behind."""

import asyncio
import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from adapters import Store, fuse
from service import exports, fuser
from service.build_files import BuildFiles
from service.errors import api_error
from service.exports import Export, ExportResponse, Exports
from service.threads import Threads
from tests.service.conftest import World

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]
K = [f"{digit}" * 16 for digit in "0123456789"]
MIB = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def land_mib(files: BuildFiles, key: str, size: int = 1) -> Any:
    def write(folder: Path) -> None:
        (folder / "data").write_bytes(bytes(size * MIB))

    return files.land(key, write)


async def test_a_full_disk_makes_room_from_the_oldest_builds(small_disk: Path) -> None:
    store, threads = Store(small_disk, budget_bytes=2**40), Threads.start(waiting=9, wait_timeout_s=9)
    files = BuildFiles(store, threads)
    for age, key in enumerate(K[:7]):
        os.utime(await land_mib(files, key), (1000 + age,) * 2)
    files.in_use = lambda: {K[1]}
    await land_mib(files, K[8], size=3)
    assert {entry.key for entry in store.entries()} <= {K[1], *K[4:7], K[8]}
    assert {K[1], K[6], K[8]} <= {entry.key for entry in store.entries()}, "no more than needed, and none in use"
    files.in_use = lambda: {K[1], K[8], K[9]}
    with pytest.raises(OSError, match="No space left"):
        await land_mib(files, K[9], size=6)
    assert sorted(os.listdir(small_disk)) == [K[1], K[8]], "all that could go went, and no scratch folder stays"
    threads.close()


async def test_a_disk_that_is_full_to_the_last_byte_lets_entries_go(small_disk: Path) -> None:
    store, threads = Store(small_disk / "store", budget_bytes=2**40), Threads.start(waiting=9, wait_timeout_s=9)
    files = BuildFiles(store, threads)
    await land_mib(files, K[0])
    with pytest.raises(OSError, match="No space left"), (small_disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
    await land_mib(files, K[1])
    assert [entry.key for entry in store.entries()] == [K[1]]
    threads.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
async def test_only_a_full_disk_costs_old_builds(world: Callable[..., World], code: int) -> None:
    w = world(capacity=2)
    await w.warm("svd(1*a, rank=2)", "svd(2*a, rank=2)", "svd(3*a, rank=2)")
    left, (oldest, *_) = 2, [entry.key for entry in w.store.entries()]
    land = w.store.land

    def fail_twice(key: str, write: Callable[[Path], None]) -> Path:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(code, os.strerror(code))
        return land(key, write)

    w.store.land = fail_twice  # type: ignore[method-assign]  # a disk that is full, or broken
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            await w.pool.acquire(w.fusion("svd(4*a, rank=2)"))
        assert w.store.get(oldest) is not None
    else:
        await w.warm("svd(4*a, rank=2)")
        assert w.store.get(oldest) is None
        assert len(w.residency.residents) == 2, "what is idle in the engine goes last"


@pytest.fixture
def shelf(world: Callable[..., World], tmp_path: Path) -> Iterator[tuple[World, Exports]]:
    w, threads = world(), Threads.start(waiting=9, wait_timeout_s=9)
    yield w, Exports(tmp_path / "data", w.materializer, w.files, threads)
    threads.close()


async def send_to_nobody(message: Message) -> None:
    if message["type"] == "http.response.body":
        raise OSError("gone")


async def test_an_export_is_sent_in_parts_and_ends_with_its_client(
    shelf: tuple[World, Exports], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "PART_BYTES", 1000)
    (tmp_path / "data").mkdir()
    w, kept = shelf
    sent: list[Message] = []

    async def send(message: Message) -> None:
        assert os.listdir(tmp_path / "data") == []
        sent.append(message)

    async def respond(export: Export, to: Any) -> None:
        await ExportResponse(export, media_type="application/x-tar", headers={})({"type": "http"}, to, to)

    export = await kept.make(w.fusion("1*a + 1*d"))
    await respond(export, send)
    parts = [message["body"] for message in sent[1:]]
    assert len(parts) > 2
    assert dict(sent[0]["headers"])[b"content-length"] == b"%d" % sum(map(len, parts))
    assert [message["more_body"] for message in sent[1:]] == [True] * (len(parts) - 1) + [False]
    with pytest.raises(OSError, match="gone"):
        await respond(await kept.make(w.fusion("1*a")), send_to_nobody)
    slow = asyncio.create_task(respond(await kept.make(w.fusion("1*a")), lambda _: asyncio.sleep(3600)))
    await asyncio.sleep(0.05)
    slow.cancel()
    await asyncio.wait([slow])
    await asyncio.sleep(0.05)
    assert not [path for path in Path("/proc/self/fd").iterdir() if str(tmp_path / "data") in os.path.realpath(path)]


async def test_an_export_that_fails_or_is_given_up_leaves_nothing(
    shelf: tuple[World, Exports], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, (w, kept) = tmp_path / "data", shelf
    data.mkdir()

    def fuse_slowly(*args: Any, **options: Any) -> Any:
        time.sleep(0.3)
        return fuse(*args, **options)

    monkeypatch.setattr(fuser, "fuse", fuse_slowly)
    gone = asyncio.create_task(kept.make(w.fusion("1*a")))
    await asyncio.sleep(0.1)
    assert [path.name.partition("-")[0] for path in data.iterdir()] == ["export"]
    gone.cancel()
    await asyncio.wait([gone])
    while list(data.iterdir()):
        await asyncio.sleep(0.01)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fuser, "save", full)
    with pytest.raises(OSError, match="No space left"):
        await kept.make(w.fusion("1*a"))
    assert list(data.iterdir()) == []


async def test_a_build_is_served_when_old_ones_could_not_be_evicted(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = world()

    def fail(*_: object) -> list[str]:
        raise OSError("busy")

    monkeypatch.setattr(w.store, "evict", fail)
    await w.warm("1*a")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 507),
        (TimeoutError("timed out"), 500),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 500),
    ],
)
async def test_only_errors_of_the_disk_are_called_so(error: OSError, status: int) -> None:
    assert api_error(error).status == status
