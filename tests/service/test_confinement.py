"""The limits under which the container is tested act."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.confinement import confine, is_possible, limit

GREEDY = """
import subprocess
started = []
try:
    for _ in range(40):
        started.append(subprocess.Popen(["sleep", "1"]))
except BlockingIOError:
    print(len(started), flush=True)
memory = bytearray(300 * 2**20)
for i in range(0, len(memory), 4096):
    memory[i] = 1
print("no limit")
"""


def test_a_group_has_limits_of_processes_and_memory(tmp_path: Path) -> None:
    with limit("lora-fusion-test-limits", memory=200 * 2**20, pids=20) as group:
        if group is None or not is_possible():
            pytest.skip("this machine lets us make no control group")
        command = [*confine(writable=[tmp_path], hidden=[], group=group), sys.executable, "-c", GREEDY]
        said = subprocess.run(command, capture_output=True, text=True)
        assert (said.returncode, said.stdout) == (-9, "19\n")
        assert group.refused_forks > 0
        assert group.kills == 1
