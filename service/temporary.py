"""The folder for temporary files of one server and all its processes: nothing in it outlives them for long."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

PREFIX = "fusion-"
LOCK = "lock"
MAX_PARENT = 50
"""Characters: the path of a Unix socket in the folder may have 107."""


@contextmanager
def hold_temporary_folder() -> Iterator[Path]:
    """A new folder, deleted at the end; those of servers that were killed are deleted first.

    It lies in the usual place (TMPDIR), or in `/tmp` where that one's path is too long for sockets.
    """
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > MAX_PARENT:
        parent = Path("/tmp")
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            _delete_abandoned(folder)
    folder, handle = _make_locked(parent)
    with handle:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _make_locked(parent: Path) -> tuple[Path, IO[str]]:
    """A new folder, and its lock, held: another start may delete the folder between the two, then there is one more."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        with suppress(FileNotFoundError):
            handle = (folder / LOCK).open("w")
            fcntl.flock(handle, fcntl.LOCK_EX)
            if (folder / LOCK).exists():
                return folder, handle
            handle.close()


def _delete_abandoned(folder: Path) -> None:
    """Delete a folder of ours whose lock nobody holds; OSError when it is none, or in use."""
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        return
    with (folder / LOCK).open() as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
