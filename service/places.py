"""The engine's places for stacks and builds, given out first come, first served."""

import asyncio
from collections import deque


class Places:
    """`free` places, and the line of those who wait for one."""

    def __init__(self, capacity: int) -> None:
        self.free = capacity
        self._line: deque[asyncio.Future[None]] = deque()

    @property
    def wanted(self) -> int:
        """How many wait."""
        return len(self._line)

    async def take(self) -> None:
        """Take a place, waiting in line when none is free; whoever is canceled there takes none."""
        if self.free:  # then nobody waits
            self.free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn in self._line:
                self._line.remove(turn)
            elif not turn.cancelled():  # it was given the place in that moment
                self.give_back()
            raise

    def give_back(self) -> None:
        """Give a place to the first in line, else free it."""
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.free += 1
