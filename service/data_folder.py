"""The data folder: held by one server at a time, cleared of what killed servers left in it."""

import fcntl
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_WAIT_S = 10
"""A server that is just stopping releases its data folder within this."""
SCRATCH_PREFIXES = ("proof", "export", "upload", "restore")


@contextmanager
def hold_data_folder(data: Path) -> Iterator[None]:
    """Create `data`, lock it for this process, clear old scratch folders; RuntimeError when another server has it.

    A new folder is its owner's alone: it has system prompts, and hashes of keys.
    """
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (data / "lock").open("w") as handle:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"another server uses the data folder {str(data)!r}; stop it or set FUSION_DATA"
                    ) from None
                time.sleep(0.2)
        for scratch in (folder for prefix in SCRATCH_PREFIXES for folder in data.glob(f"{prefix}-*")):
            shutil.rmtree(scratch, ignore_errors=True)  # from a server that was killed
        yield


@contextmanager
def scratch_folder(data: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `data`, deleted at the end; `prefix` is one of `SCRATCH_PREFIXES`.

    For use within one thread: it goes when the work in it has ended, whoever still waits for that.
    """
    folder = data / f"{prefix}-{secrets.token_hex(8)}"
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
