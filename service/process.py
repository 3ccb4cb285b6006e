"""Processes that end with the one that started them, even when that one is killed, and return freed memory."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1
POLL_S = 2.0
TRIM_S = 10.0


def end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent dies (Linux; a no-op elsewhere)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def exit_when_gone(pid: int) -> None:
    """Watch process `pid` from a thread; once it is gone, kill this process's parent (unless that is `pid`) and itself.

    vLLM's engine core does not notice that the server above it was killed; its workers can.
    """
    parent = os.getppid()

    def alive() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:  # no /proc here
            return sys.platform != "linux"

    def watch() -> None:
        while alive():
            time.sleep(POLL_S)
        if os.getppid() == parent and parent not in (1, pid):
            os.kill(parent, signal.SIGKILL)
        os._exit(1)

    if alive():  # on another machine the number means nothing
        threading.Thread(target=watch, name="exit-when-gone", daemon=True).start()


def return_freed_memory() -> None:
    """Every TRIM_S seconds, from a thread, return this process's freed pages to the system (glibc; some 10 ms each).

    Steps of varying sizes scatter free pages over the heap; by itself glibc returns them only from the heap's end.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def watch(trim: Callable[[int], int]) -> None:
        while True:
            time.sleep(TRIM_S)
            trim(0)

    if trim is not None:
        threading.Thread(target=watch, args=(trim,), name="return-freed-memory", daemon=True).start()
