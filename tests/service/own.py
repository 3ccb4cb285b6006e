"""A server of a test's own, to be frozen and killed, and what must be left of it: nothing."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from service.data_folder import hold_data_folder
from tests.conftest import ROOT, family, launch

LOOP_TIMEOUT_S, STOP_TIMEOUT_S = 5, 4
MARGIN_S = 20
"""What a busy machine may add to a bound."""


HASTY = """
from service import data_folder, database
data_folder.LOCK_WAIT_S = database.LOCK_WAIT_S = 1
"""
"""A `sitecustomize` of a server that finds its data folder or registry in use."""


def wait(condition: Callable[[], bool], limit_s: float) -> None:
    """Return once `condition` holds; fails after `limit_s`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s
        time.sleep(0.05)


class Own:
    """A server with a temporary and a data folder of its own in `folder`, whose path must be short: sockets lie in it.

    `site` becomes `sitecustomize`, which every process of it runs first. `data` is the data folder of another server
    that has ended.
    """

    def __init__(self, folder: Path, *, site: str = "", data: Path | None = None, **settings: Any) -> None:
        self.log, self.data, self.scratch = folder / "log", data or folder / "data", folder / "t"
        self.scratch.mkdir()
        (folder / "sitecustomize.py").write_text(site)
        limits: dict[str, Any] = {
            "FUSION_LOOP_TIMEOUT_S": str(LOOP_TIMEOUT_S),
            "FUSION_STOP_TIMEOUT_S": str(STOP_TIMEOUT_S),
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
            "TMPDIR": str(self.scratch),
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        self.process, self.url = launch(self.data, ROOT / "examples/adapters", self.log, **limits | settings)
        self.everyone: set[int] = set()
        """All processes of it that were seen."""

    def find(self, name: str) -> int:
        """The running process whose command line has `name`; 0 when there is none."""
        self.everyone |= set(family(self.process.pid))
        for pid in self.everyone:
            if family(pid) and name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        return 0

    @property
    def worker(self) -> int:
        return self.find("worker.service")

    @property
    def core(self) -> int:
        return self.find("EngineCore")

    def get(self, path: str, timeout: float = 5) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=timeout)

    def status(self, path: str) -> int:
        """Status of the answer; 0 without one."""
        try:
            return self.get(path).status_code
        except httpx.HTTPError:
            return 0

    def readiness(self) -> dict[str, Any]:
        """What `/readyz` says; empty without an answer."""
        try:
            return dict(self.get("/readyz").json())
        except httpx.HTTPError:
            return {}

    def wait_ready(self, limit_s: float = 200) -> None:
        wait(lambda: self.process.poll() is not None or self.status("/readyz") == 200, limit_s)
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        assert self.worker
        assert self.core

    def error(self) -> str:
        """The line in which it says why it ended, with exit code 1."""
        assert self.process.wait(300) == 1, self.log.read_text()[-3000:]
        return [line for line in self.log.read_text().splitlines() if line.startswith("error: ")][-1]

    def left(self) -> list[str]:
        """What it has left in the temporary folder, besides torch's one cache, which is to stay."""
        return [path.name for path in self.scratch.iterdir() if not path.name.startswith("torchinductor_")]

    def port_is_free(self) -> bool:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", httpx.URL(self.url).port or 0))
            except OSError:
                return False
        return True

    def assert_gone(self) -> None:
        """None of its processes runs, and its port and data folder are free."""
        wait(lambda: not [pid for pid in self.everyone if family(pid)], MARGIN_S)
        wait(self.port_is_free, MARGIN_S)  # a killed process's threads end one by one
        with hold_data_folder(self.data):
            pass
