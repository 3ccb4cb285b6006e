"""Processes that end with the server, however that one ended."""

import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, family

SLEEP = "print('ready', flush=True); time.sleep(60)"
CHILD = f"import time; from service import process; process.end_with_parent(); {SLEEP}"
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


@pytest.mark.parametrize(
    ("started", "count"), [(CHILD, 2), (PARENT.format(WORKER), 3)], ids=["with its parent", "with its grandparent"]
)
def test_no_process_outlives_a_killed_server(started: str, count: int) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(started)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    everyone = family(server.pid)
    assert len(everyone) == count
    server.kill()
    server.wait()
    deadline = time.monotonic() + 10
    while (left := [pid for pid in everyone if family(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
