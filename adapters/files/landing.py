"""Folders that appear whole or not at all: filled beside their place, synced to disk, then renamed.

    with atomic_folder(Path("out")) as folder:
        (folder / "data").write_bytes(content)

Where several processes fill one folder, or the block cannot be one `with`, `land_folder` is the last step alone.
"""

import contextlib
import hashlib
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

SCRATCH_PREFIX = ".landing-"
STALE_SECONDS = 3600.0
_PROCESSES = os.readlink("/proc/self/ns/pid") if os.path.islink("/proc/self/ns/pid") else ""
"""Containers may share a host's name, but then not its numbers of processes."""
_HOST = hashlib.sha256(f"{platform.node()} {_PROCESSES}".encode()).hexdigest()[:8]


@contextlib.contextmanager
def atomic_folder(out: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yield a fresh folder beside `out`, and move it there when the block ends without an exception.

    An empty folder at `out` is taken over, and with `replace` any folder, whole. Parents of `out` are made. An
    exception in the block passes through, removes the scratch folder and leaves `out` as it was.

    Raises:
        FileExistsError: `out` is taken: before the block runs, or after it, when another process was first.
        OSError: the disk is full, or the folder cannot be synced or renamed.
    """
    target = Path(os.path.abspath(out))
    if os.path.lexists(target) and not (target.is_dir() if replace else _is_empty_folder(target)):
        raise _exists_error(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target.parent) as scratch:
        yield scratch
        land_folder(scratch, out, replace=replace)


def land_folder(scratch: Path, out: str | os.PathLike[str], *, replace: bool = False) -> None:
    """Sync `scratch` with all it holds and rename it to `out`, on the same file system; raises as `atomic_folder`.

    A process killed while it replaces a folder may leave `out` absent, never half a folder.
    """
    target = Path(os.path.abspath(out))
    for folder, _, files in os.walk(scratch):
        for path in (*(Path(folder, file) for file in files), Path(folder)):
            sync(path)
    try:
        scratch.rename(target)
    except OSError as error:
        if not os.path.lexists(target):
            raise
        if not (replace and target.is_dir()):
            raise _exists_error(out) from error
        _swap(scratch, target)
    sync(target.parent)


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder in `parent` that is removed at the end; its name says which process owns it (see `remove_stale`)."""
    folder = new_scratch_path(parent)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_scratch_path(parent: Path) -> Path:
    """A path in `parent` that is not taken; `remove_stale` deletes what is there once this process is gone."""
    return parent / f"{SCRATCH_PREFIX}{_HOST}-{os.getpid()}-{secrets.token_hex(8)}"


def remove_stale(parent: Path) -> None:
    """Delete what killed processes left in `parent`: scratch folders whose owner is gone, or older than an hour."""
    for folder in parent.glob(SCRATCH_PREFIX + "*"):
        if _is_stale(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _swap(scratch: Path, target: Path) -> None:
    """Put `scratch` in the place of `target`; when that fails, `target` is put back."""
    with scratch_folder(target.parent) as retired:
        old = retired / target.name
        try:
            target.rename(old)
            scratch.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise


def _exists_error(out: str | os.PathLike[str]) -> FileExistsError:
    return FileExistsError(f"{os.fspath(out)!r} already exists: choose another place or remove it first")


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _is_stale(folder: Path) -> bool:
    """Whether the process that made this scratch folder is gone (other hosts' folders go by age alone)."""
    host, _, rest = folder.name.removeprefix(SCRATCH_PREFIX).partition("-")
    pid = rest.partition("-")[0]
    try:
        if time.time() - folder.stat().st_mtime > STALE_SECONDS:
            return True
    except FileNotFoundError:
        return False
    return host == _HOST and not (pid.isdecimal() and _is_alive(int(pid)))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def sync(path: Path) -> None:
    """Have what is written to a file, or which files a folder has, outlive a power cut; links are left alone."""
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return  # a link's target is not ours, and opening a FIFO would wait
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
