"""Shares of the engine: however much one client asks for, others get their turn.

The engine computes so many sequences at once and takes further ones in the order in which they come: a request for 128
answers of 8,000 tokens, sent twice, keeps everybody else waiting for hours. So the sequences of one client take three
quarters of them at most, and wait here for the others; and in the engine those of clients with few go first, also where
memory is short, by vLLM's priorities.
"""

from asyncio import CancelledError, Future, get_running_loop
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from vllm.exceptions import VLLMClientError

from service.engine.dry_run import dry_run
from service.engine.models import Generate

current_client: ContextVar[str | None] = ContextVar("fusion_client", default=None)
"""Who has sent the request at hand; None: the server itself, which waits for nobody."""

current_priority: ContextVar[int] = ContextVar("fusion_priority", default=0)
"""How urgent the request at hand is, as a router says: larger goes first."""
PRIORITY_STEP = 64
"""Above what a client's own requests add up to, in bits."""


class Turns:
    """The sequences of each client among the `slots` that the engine computes at once."""

    def __init__(self, slots: int) -> None:
        self._share = max(1, 3 * slots // 4)
        self._used: Counter[str] = Counter()
        self._lines: dict[str, deque[tuple[int, Future[None]]]] = {}

    def check(self, count: int) -> None:
        """Raise `VLLMClientError` when `count` sequences are more than a client may ever hold."""
        if count > self._share:
            raise VLLMClientError(f"'n' is {count}, but this server gives a client {self._share} answers at once.")

    @asynccontextmanager
    async def hold(self, name: str, count: int) -> AsyncIterator[int]:
        """Hold places for `count` sequences of a client for the block, in turn; gives how many others it holds."""
        if name in self._lines or self._used[name] + count > self._share:
            await self._wait(name, count)
        else:
            self._used[name] += count
        try:
            yield self._used[name] - count
        finally:
            self._used[name] -= count
            self._advance(name)

    async def _wait(self, name: str, count: int) -> None:
        turn: Future[None] = get_running_loop().create_future()
        entry = (count, turn)
        self._lines.setdefault(name, deque()).append(entry)
        try:
            await turn
        except CancelledError:
            if turn.done() and not turn.cancelled():
                self._used[name] -= count
            else:
                self._lines[name].remove(entry)
            self._advance(name)
            raise

    def _advance(self, name: str) -> None:
        """Let those who come next go ahead, and forget a client that has nothing."""
        line = self._lines.get(name, deque())
        while line and self._used[name] + line[0][0] <= self._share:
            count, turn = line.popleft()
            if not turn.done():
                self._used[name] += count
                turn.set_result(None)
        if not line:
            self._lines.pop(name, None)
            if not self._used[name]:
                del self._used[name]


def take_turns(generate: Generate, turns: Turns) -> Generate:
    """vLLM's `generate` that waits for its client's turn; clients themselves have no say in priorities."""

    async def generate_in_turn(prompt: Any, params: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        name = current_client.get()
        if name is not None:
            turns.check(params.n)
        async with nullcontext(0) if name is None or dry_run.get() else turns.hold(name, params.n) as others:
            # Smaller goes first; first come, first served among clients with about as many.
            kwargs["priority"] = others.bit_length() - PRIORITY_STEP * current_priority.get()
            async with aclosing(generate(prompt, params, *args, **kwargs)) as outputs:
                async for output in outputs:
                    yield output

    return generate_in_turn
