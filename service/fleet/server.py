"""One replica's server: `python -m service` on a loopback port, which ends with the process that started it."""

import asyncio
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx

from service.fleet.routing import Call, Head, Headers, ReplicaLostError
from service.process import end_with_parent

START_LIMIT_S = 1800.0
"""A large base is fetched, read and compiled in this time."""
POLL_S = 0.2
MAX_FOLDERS = 256
OWN_TO_A_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)
"""Headers that say something about one connection alone."""


def hold_folder(parent: Path) -> tuple[Path, int]:
    """A data folder in `parent` that no replica of this machine has, and the file descriptor that holds it.

    A replica that takes another's place finds its copies there. OSError when all are held.
    """
    for i in range(MAX_FOLDERS):
        folder = parent / f"replica-{i}"
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "replica-lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
        else:
            return folder, descriptor
    raise OSError(f"{parent} has {MAX_FOLDERS} replicas' folders, all in use")


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def drop_hop_headers(headers: Headers) -> Headers:
    """Without those of the connection, by themselves and as `Connection` names them."""
    named = {name.strip().lower() for key, value in headers if key == b"connection" for name in value.split(b",")}
    return [pair for pair in headers if pair[0] not in OWN_TO_A_HOP and pair[0] not in named]


class ReplicaServer:
    """The server of a replica, started by `start`; `on_end` is called when it ends unasked, or has to."""

    def __init__(self, environment: Mapping[str, str], on_end: Callable[[], None], stop_s: float) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self._environment = {**environment, "FUSION_HOST": "127.0.0.1", "FUSION_PORT": str(port)}
        self._on_end, self._stop_s, self._stops = on_end, stop_s, False
        self._process: subprocess.Popen[bytes] | None = None
        self._has_process = threading.Event()
        # No limits here: the server has its own, and Serve counts what a replica has in progress.
        # A kept connection ends here, before the server ends it: a request would be lost with it.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2)
        self._http = httpx.AsyncClient(base_url=self.url, timeout=httpx.Timeout(None, connect=10), limits=limits)

    async def start(self) -> None:
        """Start the server and return once it is ready; RuntimeError when it ends or takes too long."""
        # The kernel ends the server with the *thread* that started it, so this one lives as long.
        threading.Thread(target=self._run, name="replica-server", daemon=True).start()
        async with asyncio.timeout(START_LIMIT_S):
            while not await self.answers("/readyz"):
                if self._process is not None and self._process.poll() is not None:
                    raise RuntimeError("the replica's server could not start; its log is above")
                await asyncio.sleep(POLL_S)
        self._has_process.set()

    def _run(self) -> None:
        command, parent = [sys.executable, "-m", "service"], os.getpid()
        self._process = subprocess.Popen(
            command, env=self._environment, start_new_session=True, preexec_fn=partial(end_with_parent, parent)
        )
        self._process.wait()
        if self._has_process.is_set() and not self._stops:
            self._on_end()

    async def answers(self, path: str) -> bool:
        """Whether `path` is answered 200 within 5 s."""
        try:
            return (await self._http.get(path, timeout=5)).status_code == 200
        except httpx.HTTPError:
            return False

    async def _end_if_down(self) -> None:
        """Give up a server that accepts nothing or cannot answer, since requests would go on coming to an idle replica;
        one that is merely slow stays.
        """
        try:
            is_down = (await self._http.get("/health", timeout=5)).status_code == 503
        except httpx.TimeoutException:
            is_down = False
        except httpx.HTTPError:
            is_down = True
        if is_down and not self._stops:
            self._on_end()

    async def pass_on(self, call: Call) -> AsyncGenerator[Head | bytes, None]:
        """Head and body of the server's answer, the bytes as they come; `ReplicaLostError` when it breaks off.

        A client that goes ends the request at the server, too, since the generator is closed then.
        """
        headers = [pair for pair in drop_hop_headers(call.headers) if pair[0] != b"content-length"]
        request = httpx.Request(call.method, f"{self.url}{call.target}", headers=headers, content=call.body)
        try:
            response = await self._http.send(request, stream=True)
            try:
                if response.status_code >= 500:
                    await self._end_if_down()
                pairs = [(name.lower(), value) for name, value in response.headers.raw]
                yield Head(response.status_code, drop_hop_headers(pairs))
                async for part in response.aiter_raw():
                    yield part
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            await self._end_if_down()
            raise ReplicaLostError(repr(error)) from error

    def stop(self) -> None:
        """End the server: SIGTERM, and SIGKILL when it has not ended in time."""
        self._stops = True
        if (process := self._process) is None:
            return
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(self._stop_s)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                process.kill()
