"""Child processes with limits, for work on clients' texts that may take any time and memory: the server's side.

The child's side is `limited_child`. A request and its answer are JSON objects; an answer `error` says why a text cannot
be used.
"""

import asyncio
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.engine.limited_child import LENGTH

ROOT = Path(__file__).parents[2]
"""The folder of the package `service`."""
RUN = "import runpy, sys; sys.path.append(sys.argv.pop(1)); runpy.run_module(sys.argv[1], run_name='__main__')"
CHILDREN = 2
MAX_WAITING = 32
"""Requests that wait for a child."""
WAIT_S = 5.0
START_S = 60.0
ENVIRONMENT = ("TZ", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")
"""Variables that a child inherits; no key and no URL is among them."""


class ChildError(ValueError):
    """A text cannot be used; the message says why."""


class ChildrenBusyError(RuntimeError):
    """Too many texts are being worked on."""


@dataclass(frozen=True, slots=True)
class ChildLimits:
    """Of one request: bytes of memory, bytes of a text in the answer, seconds of CPU and of time."""

    memory_bytes: int
    text_bytes: int
    cpu_s: float
    wall_s: float


class _Child:
    """One child process, which ends its work by itself; started again should it end."""

    def __init__(self, module: str, limits: ChildLimits) -> None:
        self._module = module
        self._limits = limits
        self._process: Process | None = None

    async def start(self) -> None:
        """Start the process unless it runs, and wait until it has its limits."""
        if self._process is not None and self._process.returncode is None:
            return
        limits = (self._limits.memory_bytes, self._limits.text_bytes, self._limits.cpu_s, self._limits.wall_s)
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-c", RUN, str(ROOT), self._module, *map(str, limits)),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            cwd="/",
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        )
        try:
            async with asyncio.timeout(START_S):
                await self._read(self._process)
        except BaseException:
            await self.kill()
            raise

    async def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The child's answer; `ChildError` when it says an error, or was ended by a limit."""
        try:
            await self.start()
        except (OSError, EOFError, TimeoutError) as error:
            raise ChildrenBusyError("no process for this could be started; try again") from error
        process = self._process
        assert process is not None
        assert process.stdin is not None
        data = json.dumps(request).encode()
        try:
            async with asyncio.timeout(2 * self._limits.wall_s):
                process.stdin.write(LENGTH.pack(len(data)) + data)
                await process.stdin.drain()
                reply = await self._read(process)
        except BaseException as error:
            await self.kill()
            if not isinstance(error, OSError | EOFError | TimeoutError):
                raise
            raise ChildError("it is too much for the limits") from error
        if "error" in reply:
            raise ChildError(reply["error"])
        return reply

    async def _read(self, process: Process) -> dict[str, Any]:
        assert process.stdout is not None
        (length,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
        if length > 8 * self._limits.text_bytes + 2**20:  # JSON escapes a character in up to 6 bytes
            raise EOFError
        reply: dict[str, Any] = json.loads(await process.stdout.readexactly(length))
        return reply

    async def kill(self) -> None:
        """End the process, if there is one, and wait for its end."""
        if self._process is not None:
            if self._process.returncode is None:
                with suppress(ProcessLookupError):
                    self._process.kill()
            await self._process.wait()


class Children:
    """CHILDREN processes that run `module`; `what` they work on, in the plural, is for messages."""

    def __init__(self, module: str, what: str, limits: ChildLimits) -> None:
        self._what = what
        self._all = [_Child(module, limits) for _ in range(CHILDREN)]
        self._idle: asyncio.LifoQueue[_Child] = asyncio.LifoQueue()
        self._waiting = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Start the processes, so that the first request finds them."""
        for child in self._all:
            await child.start()
            self._idle.put_nowait(child)

    async def close(self) -> None:
        """End the processes."""
        for task in self._tasks:
            task.cancel()
        for child in self._all:
            await child.kill()

    async def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """A child's answer; `ChildError` when the text cannot be used, `ChildrenBusyError` when others came first."""
        if self._waiting >= MAX_WAITING:
            raise ChildrenBusyError(f"too many {self._what} are being worked on; try again")
        self._waiting += 1
        try:
            async with asyncio.timeout(WAIT_S):
                child = await self._idle.get()
        except TimeoutError:
            raise ChildrenBusyError(f"other {self._what} kept the server busy for {WAIT_S:g} s; try again") from None
        finally:
            self._waiting -= 1
        # A client that leaves does not cost its child, whose limits end the work anyway.
        return await asyncio.shield(self._spawn(self._ask_child(child, request)))

    async def _ask_child(self, child: _Child, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return await child.ask(request)
        finally:
            self._spawn(self._give_back(child))

    async def _give_back(self, child: _Child) -> None:
        # One that cannot be started now is tried again when it is asked.
        with suppress(OSError, EOFError, TimeoutError):
            await child.start()
        self._idle.put_nowait(child)

    def _spawn(self, work: Any) -> "asyncio.Task[Any]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._end_task)
        return task

    def _end_task(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen here when its request has gone
