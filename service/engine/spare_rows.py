"""Rows of weights for requests with phases, where the workers have not as many as any step could need.

Each sequence of a step has one row of its own in the workers (see `rows`). A request with more phases may need more,
in a step that computes several of them; so it holds the others here while it runs, or waits for them in turn.
"""

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from vllm.exceptions import RetryableRequestError

from service.engine.models import Generate, meter
from service.engine.weights import FUNCTION, read_mix


class RowsBusyError(RetryableRequestError):
    """A request got no rows in time. vLLM answers its base class with 503 and the message."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(
            f"Other requests whose weights change with position had all rows of the engine for {timeout_s:g} s; "
            "try again later."
        )


class SpareRows:
    """`count` rows beyond one for each sequence; None: every step finds enough."""

    def __init__(self, timeout_s: float = math.inf) -> None:
        self.timeout_s = timeout_s
        """How long a request may wait for its rows."""
        self.count: int | None = None
        self.modules = 0
        """How many modules weights may tell apart."""
        self._used = 0
        self._line: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, count: int) -> AsyncIterator[None]:
        """Hold `count` rows for the block, first come, first served; `RowsBusyError` when it does not get them in
        time.
        """
        if not self._fits(count) or self._line:
            try:
                async with asyncio.timeout(self.timeout_s):
                    await self._wait(count)
            except TimeoutError:
                raise RowsBusyError(self.timeout_s) from None
        else:
            self._used += count
        try:
            yield
        finally:
            self._used -= count
            self._advance()

    def _fits(self, count: int) -> bool:
        return self.count is None or self._used + count <= self.count

    async def _wait(self, count: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(entry := (count, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._used -= count
            elif entry in self._line:
                self._line.remove(entry)
            self._advance()
            raise

    def _advance(self) -> None:
        while self._line and self._fits(self._line[0][0]):
            count, turn = self._line.popleft()
            if not turn.done():
                self._used += count
                turn.set_result(None)


def hold_rows(generate: Generate, rows: SpareRows) -> Generate:
    """vLLM's `generate`, holding the rows of a request's phases beyond the first.

    It raises ValueError for weights of other modules than the engine's, which would end a worker.
    """

    def checked(
        prompt: Any, sampling_params: Any, *args: Any, lora_request: Any = None, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        mix = None
        if lora_request is not None and lora_request.lora_name.startswith(FUNCTION):
            mix = read_mix(lora_request.lora_name)
        if mix is not None and mix.modules not in (1, rows.modules):
            raise ValueError(f"weights of {mix.modules} modules: this engine has {rows.modules}")
        outputs = generate(prompt, sampling_params, *args, lora_request=lora_request, **kwargs)
        if mix is None or rows.count is None:
            return outputs
        return held(outputs, len({table.digest for table in mix.tables}) - 1)

    async def held(outputs: AsyncGenerator[Any, None], count: int) -> AsyncGenerator[Any, None]:
        try:
            async with aclosing(outputs), rows.hold(count):
                async for output in outputs:
                    yield output
        except RowsBusyError as error:
            if (sink := meter.get()) is not None:
                sink.refuse(str(error))
            raise

    return checked
