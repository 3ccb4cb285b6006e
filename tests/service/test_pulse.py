"""The watch over the worker's event loop: what freezes is killed, also when it holds the interpreter, and only that."""

import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

# `(a|a)*b` against many `a`: 2^n steps inside one call that never lets go of the interpreter.
FREEZES = {
    "pattern": "import re; re.match('(a|a)*b', 'a' * 60)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "blocked": "time.sleep(60)",
}
CHILD = """
import asyncio, os, signal, sys, time
from service.pulse import PULSE_FD, Pulse

async def main():
    pulse = Pulse(1.0, int(os.environ[PULSE_FD]))
    task = asyncio.create_task(pulse.run())
    time.sleep(1.5)  # a start may take longer
    await asyncio.sleep(0.1)
    pulse.expect(starting=False)
    for _ in range(5):
        await asyncio.sleep(0.1)
        time.sleep(0.4)  # a stall that is allowed
    print("alive", flush=True)
    {freeze}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    time.sleep(1.5)  # nobody watches any more
    print("done", flush=True)

asyncio.run(main())
"""
PARENT = """
import os, subprocess, sys, time
from service import pulse
ready = []
pulse.REPLACE_S, pulse.START_FACTOR = 1.5, 4
watch = pulse.Watch(1.0, lambda: ready.append(1), lambda: os._exit(7))
child = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1]], env={**os.environ, pulse.PULSE_FD: str(watch.fd)}, close_fds=False
)
watch.begin(child.pid)
code = child.wait()
print(code, bool(ready), flush=True)
if sys.argv[2] == "replaced":
    frozen = subprocess.Popen(["sleep", "60"])
    watch.begin(frozen.pid)
    print(frozen.wait())
elif sys.argv[2] == "lost":
    time.sleep(20)
"""


def run(freeze: str, after: str = "") -> tuple[list[str], str]:
    """What a watched child that does `freeze` on its loop printed, its exit code, whether it was ready; the errors.

    `after` it, the watching process goes on with another one, or with none.
    """
    child = CHILD.replace("{freeze}", freeze)
    done = subprocess.run(
        [sys.executable, "-c", PARENT, child, after], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == (7 if after == "lost" else 0), done.stderr
    return done.stdout.split(), done.stderr


@pytest.mark.parametrize("freeze", FREEZES)
def test_a_loop_that_stands_still_is_killed_and_shows_where(freeze: str) -> None:
    began = time.monotonic()
    printed, errors = run(FREEZES[freeze])
    assert printed == ["alive", str(-signal.SIGKILL), "True"], errors
    assert time.monotonic() - began < 30
    if freeze != "stopped":  # that stops the thread that would write it, too
        assert "Timeout" in errors
        assert "in main" in errors


def test_a_worker_that_is_frozen_before_its_first_beat_is_killed() -> None:
    printed, errors = run("os._exit(3)", "replaced")
    assert printed == ["alive", "3", "True", str(-signal.SIGKILL)], errors


def test_a_dead_worker_that_is_not_replaced_is_noticed() -> None:
    printed, errors = run("os.write(int(os.environ[PULSE_FD]), b'x 1\\n\\n' * 2000); os._exit(3)", "lost")
    assert printed == ["alive", "3", "True"], errors


def test_a_loop_that_moves_is_left_alone() -> None:
    printed, errors = run("pass")
    assert printed == ["alive", "done", "0", "True"], errors
    assert "Timeout" not in errors
