"""What a request ends with whose numbers left the range of the served dtype: NaN or infinite hidden states.

`runners` finds such requests in the workers, `scheduler` ends them in the engine, and here the server turns that end
into an error: HTTP 500 in OpenAI's shape, also in the middle of a stream.
"""

import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from vllm.exceptions import GenerationError

log = logging.getLogger("fusion")

STOP_REASON = "fusion-overflow"
"""The stop reason, on the way from the engine to the server, of a request that was ended."""
MESSAGE = (
    "The answer's numbers overflowed the range of the dtype that this server computes in; use smaller weights, or "
    "adapters with a smaller update."
)

Generate = Callable[..., AsyncGenerator[Any, None]]
Ends = Mapping[str, Callable[[], Exception]]
"""What makes the error of a request that the engine has ended, by stop reason."""


class AnswerOverflowError(GenerationError):
    """The hidden states of a request were not finite. vLLM answers its base class with 500 and the message."""

    def __init__(self) -> None:
        super().__init__(MESSAGE)


class Counter(Protocol):
    """A Prometheus counter."""

    def inc(self) -> None:
        """Add 1."""


@dataclass(slots=True)
class Overflows:
    """How many requests have been ended since the start, and when the last one was (UTC, ISO 8601)."""

    count: int = 0
    last: str | None = None
    counter: Counter | None = None

    def record(self) -> None:
        """Count one."""
        self.count += 1
        self.last = datetime.now(UTC).isoformat(timespec="seconds")
        if self.counter is not None:
            self.counter.inc()
        log.error("a request's numbers overflowed; it was ended, and its key-value blocks are zeroed before reuse")

    def end(self) -> AnswerOverflowError:
        """Count one; the error for its request."""
        self.record()
        return AnswerOverflowError()


def raise_ends(generate: Generate, ends: Ends) -> Generate:
    """vLLM's `generate`, raising for a request that the engine has ended for one of these reasons."""

    async def checked(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        outputs = generate(*args, **kwargs)
        try:
            async for output in outputs:
                for answer in output.outputs:
                    if answer.stop_reason in ends:
                        raise ends[answer.stop_reason]()
                yield output
        finally:
            await outputs.aclose()

    return checked
