"""Turns for work that takes one client's request some time: few at once, and no client has all of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from service.waits import enter

LIMIT = 8
"""At once; they share few threads."""


@dataclass(slots=True)
class _Line:
    """The requests of one client: a semaphore, and how many work or wait for it."""

    turns: asyncio.Semaphore
    count: int = 0


class ClientTurns:
    """Turns for one kind of work, in each client's line and then in that of all; `what` is what a request waits for,
    as "the checks of requests". There are `limit` at once, of which one client may have three quarters.
    """

    def __init__(self, what: str, timeout_s: float, limit: int = LIMIT) -> None:
        self._what = what
        self._timeout_s = timeout_s
        self._share = max(1, 3 * limit // 4)
        self._turns = asyncio.Semaphore(limit)
        self._lines: dict[str, _Line] = {}

    @asynccontextmanager
    async def hold(self, client: str | None) -> AsyncIterator[None]:
        """Hold a turn for the block; `ApiError` 503 when there is none in time."""
        name = client or ""
        line = self._lines.setdefault(name, _Line(asyncio.Semaphore(self._share)))
        line.count += 1
        try:
            async with (
                enter(line.turns, self._timeout_s, f"{self._what} of this client"),
                enter(self._turns, self._timeout_s, self._what),
            ):
                yield
        finally:
            line.count -= 1
            if not line.count:
                del self._lines[name]
