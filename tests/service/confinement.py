"""A process confined as the container is: nothing may be written but what is named, and no capability is left."""

import shlex
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path


@cache
def is_possible() -> bool:
    """Whether this machine lets us mount in a namespace of our own."""
    try:
        return subprocess.run([*_unshare(), "mount -t tmpfs tmpfs /mnt"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def confine(*, writable: Sequence[Path], hidden: Sequence[Path]) -> list[str]:
    """What to put before a command: it may write below `writable` alone and finds the folders `hidden` empty."""
    mounts = [f"mount --bind {shlex.quote(str(path))} {shlex.quote(str(path))}" for path in writable]
    mounts += [f"mount -t tmpfs -o ro tmpfs {shlex.quote(str(path))}" for path in hidden]
    mounts += ["mount -o remount,bind,ro /"]
    drop = "exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all --"
    return [*_unshare(), " && ".join([*mounts, f'{drop} "$@"']), "confined"]


def _unshare() -> list[str]:
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c"]


def read_status(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
