"""Processes that end with the one that started them, also when either is frozen, and return freed memory."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import FrameType

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 2.0
TRIM_S = 10.0
KILL_S = 5.0
"""How long the kernel may take to end processes that were killed."""
TRACKER = "resource_tracker import main"
"""In the command of the processes of Python and loky that delete what killed ones leave in /dev/shm, and end last."""

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread of `parent` that started it ends (Linux; a no-op elsewhere).

    SIGKILL, since a process that is stopped, or whose interpreter is busy, takes no other signal. Ends at once when
    `parent` has gone already.
    """
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def kill_descendants() -> None:
    """Kill whatever this process, and what it started, has started, until nothing runs or `KILL_S` are over; but for
    those that clean up after the others, and then end by themselves.
    """
    _kill_running(lambda process: not _is_tracker(process))


def _kill_trackers() -> None:
    """Let the processes that clean up end by themselves, and kill them after `KILL_S`."""
    deadline = time.monotonic() + KILL_S
    while time.monotonic() < deadline and any(map(_runs, psutil.Process().children(recursive=True))):
        time.sleep(0.02)
    _kill_running(lambda _: True)


def _kill_running(chosen: Callable[[psutil.Process], bool]) -> None:
    deadline = time.monotonic() + KILL_S
    while running := [p for p in psutil.Process().children(recursive=True) if _runs(p) and chosen(p)]:
        for process in running:
            with suppress(psutil.Error):
                process.kill()
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return any(TRACKER in part for part in process.cmdline())
    except psutil.Error:
        return False


def run_tree(command: Sequence[str], stop_s: float) -> int:
    """Run `command` to its end and return its exit code; nothing that it has started is left behind.

    SIGTERM and SIGINT are passed on, and `stop_s` seconds later everything is killed. Should this process be killed
    itself, the kernel kills `command`, which has to see to its own children (`end_with_parent`).
    """
    if _libc is not None:
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans become children of this process, which finds and reaps them
    server = subprocess.Popen(command, preexec_fn=partial(end_with_parent, os.getpid()))

    def stop(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(server.pid, number)
        if not signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.setitimer(signal.ITIMER_REAL, stop_s)

    def kill(number: int, frame: FrameType | None) -> None:
        print(f"error: not stopped within {stop_s:g} s, all processes are killed", file=sys.stderr, flush=True)
        kill_descendants()

    signal.signal(signal.SIGALRM, kill)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while True:
        pid, status = os.wait()
        if pid == server.pid:
            break
    server.returncode = os.waitstatus_to_exitcode(status)
    kill_descendants()
    _kill_trackers()
    return server.returncode


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

    threading.Thread(target=watch, name="exit-when-gone", daemon=True).start()


@cache
def return_freed_memory() -> None:
    """Every TRIM_S seconds, from one thread, return this process's freed pages to the system (glibc; some 10 ms each).

    Steps of varying sizes scatter free pages over the heap; by itself glibc returns them only from the heap's end.
    """
    trim = getattr(_libc, "malloc_trim", None)

    def watch(trim: Callable[[int], int]) -> None:
        while True:
            time.sleep(TRIM_S)
            trim(0)

    if trim is not None:
        threading.Thread(target=watch, args=(trim,), name="return-freed-memory", daemon=True).start()
