"""Processes that end with the server, however that one ended, and also when they are frozen."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, family

SLEEP = "print('ready', flush=True); time.sleep(60)"
CHILD = f"import os, time; from service import process; process.end_with_parent(os.getppid()); {SLEEP}"
WORKER = f"""
import sys, time
from service import process
process.POLL_S = 0.05
process.exit_when_gone(int(sys.argv[1]))
{SLEEP}
"""
PARENT = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {!r}, *(sys.argv[1:] or [str(os.getpid())])])
time.sleep(60)
"""
"""Starts one process; the number that it passes on is the first parent's."""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
TREE = """
import sys
from service.process import run_tree
sys.exit(run_tree([sys.executable, "-c", sys.argv[1]], float(sys.argv[2])))
"""
ORPHANS = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {DEAF!r}], start_new_session=True, stdout=subprocess.PIPE).stdout.readline()
print("ready", flush=True)
sys.exit(7)
"""
"""Leaves a process behind that is in a session of its own and takes no SIGTERM."""
SHARED = f"""
import os, subprocess, sys, time
from multiprocessing import resource_tracker, shared_memory
segment = shared_memory.SharedMemory(create=True, size=4096)
fd = resource_tracker.getfd()
subprocess.Popen([sys.executable, "-c", {DEAF!r}], stdout=subprocess.PIPE, pass_fds=[fd]).stdout.readline()
print("ready", segment.name, sep="\\n", flush=True)
time.sleep(1)
os._exit(7)
"""
"""Leaves shared memory behind, and a process that keeps Python's tracker of it from cleaning up at once."""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Run Python code and wait for the line `ready` of whatever it starts."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while (left := [pid for pid in pids if family(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize(
    ("started", "count"), [(CHILD, 2), (PARENT.format(WORKER), 3)], ids=["with its parent", "with its grandparent"]
)
def test_no_process_outlives_a_killed_server(started: str, count: int, freeze: bool) -> None:
    server = start(PARENT.format(started))
    everyone = family(server.pid)
    assert len(everyone) == count
    if freeze and count == 2:
        os.kill(everyone[-1], signal.SIGSTOP)
    server.kill()
    server.wait()
    wait_until_gone(everyone)


def test_a_process_whose_parent_is_gone_already_does_not_start() -> None:
    code = "import os; from service import process; process.end_with_parent(os.getpid()); print('still here')"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 1


@pytest.mark.parametrize("frozen", [False, True], ids=["deaf", "frozen"])
def test_a_tree_that_does_not_stop_is_killed(frozen: bool) -> None:
    tree = start(TREE, DEAF, "1")
    everyone = family(tree.pid)
    if frozen:
        os.kill(everyone[-1], signal.SIGSTOP)
    began = time.monotonic()
    tree.terminate()
    assert tree.wait(20) != 0
    assert time.monotonic() - began < 10
    wait_until_gone(everyone)


def test_a_tree_ends_with_all_that_its_command_left_behind() -> None:
    tree = start(TREE, ORPHANS, "60")
    everyone = family(tree.pid)
    assert tree.wait(20) == 7
    wait_until_gone(everyone)


def test_killed_processes_leave_no_shared_memory() -> None:
    tree = start(TREE, SHARED, "60")
    everyone = family(tree.pid)
    assert tree.stdout is not None
    segment = Path("/dev/shm", tree.stdout.readline().strip())
    assert segment.exists()
    assert tree.wait(20) == 7
    wait_until_gone(everyone)
    assert not segment.exists()


def test_a_frozen_tree_ends_when_its_first_process_is_killed() -> None:
    tree = start(TREE, DEAF, "60")
    everyone = family(tree.pid)
    os.kill(everyone[-1], signal.SIGSTOP)
    tree.kill()
    tree.wait()
    wait_until_gone(everyone)
