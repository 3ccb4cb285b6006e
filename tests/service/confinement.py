"""A process confined as the container is: nothing may be written but what is named, no capability is left, and memory
and processes have limits.
"""

import contextlib
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CONTROL = Path("/sys/fs/cgroup")
REMOVAL_S = 10.0
"""How long the last process of a group may take to be gone."""


@dataclass(frozen=True)
class Group:
    """A control group with limits of memory and processes, of version 2 of the kernel's interface or of version 1."""

    memory: Path
    """Folder of the memory controller."""
    pids: Path

    @property
    def members(self) -> list[set[int]]:
        """The processes in each controller's group."""
        return [set(map(int, (folder / "cgroup.procs").read_text().split())) for folder in (self.memory, self.pids)]

    @property
    def refused_forks(self) -> int:
        return int((self.pids / "pids.events").read_text().split()[1])

    @property
    def kills(self) -> int:
        """Processes that the kernel has ended for want of memory."""
        version_1 = self.memory / "memory.oom_control"
        text = (version_1 if version_1.exists() else self.memory / "memory.events").read_text()
        return int(dict(line.split() for line in text.splitlines())["oom_kill"])


@contextlib.contextmanager
def limit(name: str, *, memory: int, pids: int) -> Iterator[Group | None]:
    """A control group of this name, `memory` in bytes; None where this machine does not let us make one."""
    is_v2 = (CONTROL / "cgroup.controllers").exists()
    group = Group(*(CONTROL / ("" if is_v2 else controller) / name for controller in ("memory", "pids")))
    try:
        for folder in {group.memory, group.pids}:
            folder.mkdir()
        (group.memory / ("memory.max" if is_v2 else "memory.limit_in_bytes")).write_text(str(memory))
        (group.pids / "pids.max").write_text(str(pids))
    except OSError:
        remove(group)
        yield None
        return
    try:
        yield group
    finally:
        remove(group)


def remove(group: Group) -> None:
    deadline = time.monotonic() + REMOVAL_S
    for folder in {group.memory, group.pids}:
        while folder.exists() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)


@cache
def is_possible() -> bool:
    """Whether this machine lets us mount in a namespace of our own."""
    try:
        return subprocess.run([*_unshare(), "mount -t tmpfs tmpfs /mnt"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def confine(*, writable: Sequence[Path], hidden: Sequence[Path], group: Group | None = None) -> list[str]:
    """What to put before a command: it may write below `writable` alone, finds the folders `hidden` empty, and is in
    `group`.
    """
    joins = [f"echo $$ > {folder}/cgroup.procs" for folder in ({group.memory, group.pids} if group else ())]
    mounts = [f"mount --bind {shlex.quote(str(path))} {shlex.quote(str(path))}" for path in writable]
    mounts += [f"mount -t tmpfs -o ro tmpfs {shlex.quote(str(path))}" for path in hidden]
    mounts += ["mount -o remount,bind,ro /"]
    drop = "exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all --"
    return [*_unshare(), " && ".join([*joins, *mounts, f'{drop} "$@"']), "confined"]


def _unshare() -> list[str]:
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c"]


def read_status(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
