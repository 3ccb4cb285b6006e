"""Pickles of tensors made into safetensors by a process that can do nothing else; see `pickle_child`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

from adapters.errors import AdapterError, clip, quote

CHILD = Path(__file__).with_name("pickle_child.py")
FAILED = 3
MEMORY_BYTES = 2**30
"""What the child may take besides COPIES times the file."""
COPIES = 7
ENVIRONMENT = ("LD_LIBRARY_PATH", "LANG", "LC_ALL", "SYSTEMROOT")
"""Variables that the child inherits; no key and no address is among them."""


def convert_pickle(pickle: Path, out: Path) -> None:
    """Write the tensors in `pickle` to the new file `out`; AdapterError 'bad_pickle' when it holds anything else."""
    memory = MEMORY_BYTES + COPIES * pickle.stat().st_size
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    with pickle.open("rb") as stream, out.open("xb") as target:
        child = subprocess.Popen(
            [sys.executable, "-I", str(CHILD), str(memory)],
            stdin=stream,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env={**environment, "OMP_NUM_THREADS": "1"},
        )
        with child:
            try:
                _copy(child.stdout, target)
                reason = child.stderr.read().decode(errors="replace").strip() if child.stderr else ""
            except BaseException:
                child.kill()
                raise
    if child.returncode != 0:
        if child.returncode != FAILED:  # it was killed, or could not start
            reason = f"the process that reads it ended with status {child.returncode}: {reason[-200:]}"
        raise AdapterError("bad_pickle", f"{quote(pickle.name)} cannot be read as tensors alone: {clip(reason)}")


def _copy(source: IO[bytes] | None, target: IO[bytes]) -> None:
    assert source is not None
    shutil.copyfileobj(source, target, 2**20)
