"""Clients' chat templates, rendered by child processes with limits; this process only carries their text.

A template is a program: it may loop for ever, fill the memory, and already its compilation computes constants. vLLM
gets the text that a child has made of a conversation, so tokens, limits and all else are as with the base's template.
"""

import asyncio
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.engine.template_child import LENGTH

CHILD = Path(__file__).with_name("template_child.py")
CHILDREN = 2
MAX_WAITING = 32
"""Renders that wait for a child."""
WAIT_S = 5.0
CPU_S, WALL_S = 1.0, 5.0
"""Per render. A long conversation takes some milliseconds of CPU."""
START_S = 60.0
MEMORY_BYTES = 256 * 2**20
MAX_TEMPLATES = 256
"""Templates whose variables are remembered."""
ENVIRONMENT = ("TZ", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")
"""Variables that a child inherits; no key and no URL is among them."""
SAMPLE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Name three rivers."},
]
SWITCHED_OFF = "this server takes no chat templates from clients; its operator can set FUSION_CLIENT_TEMPLATES=true"


class TemplateError(ValueError):
    """A template cannot be used; the text says why."""


class TemplatesBusyError(RuntimeError):
    """Too many templates are being rendered."""


@dataclass(frozen=True, slots=True)
class ClientTemplate:
    """A template's text and what a child has found out about it."""

    text: str
    content_format: str
    variables: frozenset[str]


class _Child:
    """One child process, which ends renders by itself; started again should it end."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._process: Process | None = None

    async def start(self) -> None:
        """Start the process unless it runs, and wait until it has its limits."""
        if self._process is not None and self._process.returncode is None:
            return
        limits = (MEMORY_BYTES, self._max_bytes, CPU_S, WALL_S)
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", str(CHILD), *map(str, limits)),
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
        """The child's answer; `TemplateError` when it says an error, or was ended by a limit."""
        try:
            await self.start()
        except (OSError, EOFError, TimeoutError) as error:
            raise TemplatesBusyError("no process that renders chat templates could be started; try again") from error
        process = self._process
        assert process is not None
        assert process.stdin is not None
        data = json.dumps(request).encode()
        try:
            async with asyncio.timeout(2 * WALL_S):
                process.stdin.write(LENGTH.pack(len(data)) + data)
                await process.stdin.drain()
                reply = await self._read(process)
        except BaseException as error:
            await self.kill()
            if not isinstance(error, OSError | EOFError | TimeoutError):
                raise
            raise TemplateError("it cannot be rendered within the limits") from error
        if "error" in reply:
            raise TemplateError(reply["error"])
        return reply

    async def _read(self, process: Process) -> dict[str, Any]:
        assert process.stdout is not None
        (length,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
        if length > 8 * self._max_bytes + 2**20:  # JSON escapes a character in up to 6 bytes
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


class TemplateRenderer:
    """Renders clients' templates in CHILDREN processes, each text at most `max_bytes` long."""

    def __init__(self, max_bytes: int) -> None:
        self._all = [_Child(max_bytes) for _ in range(CHILDREN)]
        self._idle: asyncio.LifoQueue[_Child] = asyncio.LifoQueue()
        self._waiting = 0
        self._known: OrderedDict[str, ClientTemplate] = OrderedDict()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Start the processes, so that the first render finds them."""
        for child in self._all:
            await child.start()
            self._idle.put_nowait(child)

    async def close(self) -> None:
        """End the processes."""
        for task in self._tasks:
            task.cancel()
        for child in self._all:
            await child.kill()

    async def open(self, text: str) -> ClientTemplate:
        """What is known about a template; `TemplateError` when it cannot be parsed within the limits."""
        if text not in self._known:
            reply = await self._ask({"template": text})
            template = ClientTemplate(text, reply["format"], frozenset(reply["variables"]))
            self._known[text] = template
            if len(self._known) > MAX_TEMPLATES:
                self._known.popitem(last=False)
        self._known.move_to_end(text)
        return self._known[text]

    async def render(self, text: str, messages: Sequence[Any], arguments: Mapping[str, Any]) -> str:
        """The text that a template makes of `messages`; `arguments` are those of `apply_chat_template`."""
        reply = await self._ask({"template": text, "messages": messages, "arguments": arguments})
        return str(reply["text"])

    async def check(self, text: str) -> None:
        """Raise `TemplateError` unless a template makes a text of a short conversation."""
        template = await self.open(text)
        sample: list[dict[str, Any]] = [dict(turn) for turn in SAMPLE]
        if template.content_format == "openai":
            sample = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in sample]
        await self.render(text, sample, {"add_generation_prompt": True})

    async def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._waiting >= MAX_WAITING:
            raise TemplatesBusyError("too many chat templates are being rendered; try again")
        self._waiting += 1
        try:
            async with asyncio.timeout(WAIT_S):
                child = await self._idle.get()
        except TimeoutError:
            raise TemplatesBusyError(f"no chat template could be rendered within {WAIT_S:g} s; try again") from None
        finally:
            self._waiting -= 1
        # A client that leaves does not cost its child, whose limits end the render anyway.
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
