"""Servers in processes of their own, for benchmarks and tests: start, wait until ready, end with all they started."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.common import BASE, ROOT

START_LIMIT_S = 400
STOP_LIMIT_S = 60


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(
    command: Sequence[str], environment: Mapping[str, str], cwd: Path, log: Path
) -> tuple[subprocess.Popen[bytes], str]:
    """Start `command` on a free port, filled in for `{port}` in its parts and in `environment`; the process and its
    address. The environment is the whole one, not an addition.
    """
    port = str(free_port())
    with log.open("wb") as out:
        process = subprocess.Popen(
            [part.replace("{port}", port) for part in command],
            cwd=cwd,
            env={name: value.replace("{port}", port) for name, value in environment.items()},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, f"http://127.0.0.1:{port}"


def wait_ready(process: subprocess.Popen[bytes], url: str, log: Path, path: str = "/readyz") -> None:
    """Return once `path` answers 200; else stop the server and raise RuntimeError with the end of its log."""
    deadline = time.monotonic() + START_LIMIT_S
    try:
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{url}{path}", timeout=5).status_code == 200:
                    return
            time.sleep(0.1)
    except BaseException:  # Ctrl-C and SIGTERM too
        stop(process)
        raise
    stop(process)
    raise RuntimeError(f"the server did not become ready:\n{log.read_text()[-6000:]}")


def family(pid: int) -> list[int]:
    """`pid` and its running descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has just ended
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(entry.name)] = int(parent)
    members = [pid] if pid in parents else []
    for member in members:  # grows while it is walked
        members += [child for child, parent in parents.items() if parent == member]
    return members


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server: SIGTERM, then SIGKILL for it and its descendants."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            for pid in family(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(10)


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A benchmark's server while it runs."""

    url: str
    started_s: float
    """Seconds from the command to ready."""


@contextmanager
def run_server(
    command: Sequence[str], environment: Mapping[str, str], cwd: Path, log: Path, ready_path: str
) -> Iterator[RunningServer]:
    """Start a server on the cores at hand, wait until it is ready, and end it with what it started."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # else the server would outlive us
    # Both sides get all cores: vLLM would keep one of two free, which this service undoes by itself.
    cores = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    common = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"} | cores
    common.pop("PYTHONPATH", None)
    began = time.monotonic()
    process, url = start(command, common | dict(environment), cwd, log)
    try:
        wait_ready(process, url, log, ready_path)
        yield RunningServer(url, time.monotonic() - began)
    finally:
        stop(process)


def stock(flags: Sequence[str], scratch: Path, base: Path = BASE) -> AbstractContextManager[RunningServer]:
    """vLLM's own server over `base`, in a folder where none of our code can be imported."""
    folder = scratch / "stock"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    command += ["--port", "{port}", "--model", str(base), "--served-model-name", base.name]
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    return run_server([*command, *flags], environment, folder, scratch / "stock.log", "/health")


def ours(
    flags: Sequence[str], scratch: Path, tree: Path = ROOT, /, **settings: str
) -> AbstractContextManager[RunningServer]:
    """The fusion service over the same base, its code taken from `tree`."""
    environment = {"FUSION_PORT": "{port}", "FUSION_BASE": str(BASE), "FUSION_DATA": str(scratch / "data")}
    environment |= {"FUSION_ENGINE_ARGS": " ".join(flags), "FUSION_ADAPTER_ROOTS": str(scratch)} | settings
    return run_server([sys.executable, "-m", "service"], environment, tree, scratch / "ours.log", "/readyz")
