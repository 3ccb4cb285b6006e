"""Shares of the engine: however much one client asks for, others get their turn.

The engine computes so many sequences at once and takes further ones in the order in which they come: a request for 128
answers of 8,000 tokens, sent twice, keeps everybody else waiting for hours. So the sequences of one client take three
quarters of them at most, and wait here for the others. In the engine they are ordered by the tokens that their client
has had, those of answers counting twice (start-time fair queuing), also where memory is short, by vLLM's priorities.
While a client waits for a slot of the engine's batch, those that have had more send nothing that would keep it, and of
its own requests none once it has waited for `PATIENCE_S`: until then, what finds its adapter in a slot goes first. And
beside a client with a crowd of sequences, those of others begin in a step without it (see `first_steps`).
"""

import time
from asyncio import CancelledError, Future, get_running_loop
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vllm.exceptions import VLLMClientError

from service.engine.dry_run import dry_run
from service.engine.first_steps import mark
from service.engine.models import Generate

current_client: ContextVar[str | None] = ContextVar("fusion_client", default=None)
"""Who has sent the request at hand; None: the server itself, which waits for nobody."""

current_priority: ContextVar[int] = ContextVar("fusion_priority", default=0)
"""How urgent the request at hand is, as a router says: larger goes first."""
PRIORITY_STEP = 2**48
"""Above what the tokens of all clients add up to."""
INPUT, OUTPUT = 1, 2
"""What a token of a prompt and one of an answer cost."""
ANSWER = 64
"""Tokens that an answer is expected to have, until its client has had one."""
CROWD = 8
"""Sequences of one client that make others wait, and more than another has."""
MAX_CLIENTS = 1024
"""In memory, when those go that are no further than others who come anew."""
PATIENCE_S = 5.0
"""How long a request may wait for a slot before others of its own client send nothing that would keep it, either."""
LEARN = 0.2
"""The weight of the latest answer in what the next ones are expected to have."""


@dataclass(slots=True, eq=False)
class Turn:
    """A request's turn: `count` sequences of a client, with a prompt of `prompt` tokens and the LoRA `adapter`."""

    client: str
    count: int
    prompt: int
    adapter: int | None
    start: float = 0.0
    """The tokens that its client had had, as the engine orders by."""
    alone: bool = False
    """Whether it begins in a step without a crowd."""
    expected: float = 0.0
    used: int = 0
    """Tokens of its answers so far."""
    begun: bool = False
    since: float = 0.0
    """When it went to the engine, by the monotonic clock."""
    entered: Future[None] | None = None


@dataclass(slots=True)
class _Client:
    """What one client has: sequences in the engine, those that wait here, and what it has had."""

    sequences: int = 0
    line: deque[Turn] = field(default_factory=deque)
    finish: float = 0.0
    answer: float = ANSWER


class Turns:
    """The sequences of each client among the `places` that the engine computes at once, with `slots` adapters."""

    def __init__(self, places: int, slots: int = 2**31) -> None:
        self._share = max(1, 3 * places // 4)
        self._slots = slots
        self._clients: dict[str, _Client] = {}
        self._running: set[Turn] = set()
        self._adapters: Counter[int] = Counter()
        self._now = 0.0
        """The least start of those in the engine: whoever comes anew starts there."""

    def check(self, count: int) -> None:
        """Raise `VLLMClientError` when `count` sequences are more than a client may ever hold."""
        if count > self._share:
            raise VLLMClientError(f"'n' is {count}, but this server gives a client {self._share} answers at once.")

    @asynccontextmanager
    async def hold(self, turn: Turn) -> AsyncIterator[None]:
        """Hold places for a turn's sequences for the block, when it is its turn."""
        client = self._clients.setdefault(turn.client, _Client())
        if client.line or not self._may_enter(client, turn):
            await self._wait(client, turn)
        else:
            self._enter(client, turn)
        try:
            yield
        finally:
            self._leave(client, turn)

    def begin(self, turn: Turn) -> None:
        """The engine has begun to answer: it has its slot."""
        if not turn.begun:
            turn.begun = True
            self._advance()

    def _may_enter(self, client: _Client, turn: Turn) -> bool:
        if client.sequences + turn.count > self._share:
            return False
        if len(self._adapters) <= self._slots or turn.adapter is None:
            return True
        start, late = self._find_start(client), time.monotonic() - PATIENCE_S
        blocked = (other for other in self._running if not other.begun and other.adapter not in (None, turn.adapter))
        return not any(
            other.start <= start if other.client != turn.client else other.since <= late for other in blocked
        )

    def _find_start(self, client: _Client) -> float:
        self._now = max(self._now, min((turn.start for turn in self._running), default=0.0))
        return max(self._now, client.finish)

    def _enter(self, client: _Client, turn: Turn) -> None:
        others = max((other.sequences for other in self._clients.values() if other is not client), default=0)
        turn.alone = others >= max(CROWD, client.sequences + turn.count)
        client.sequences += turn.count
        turn.start, turn.since = self._find_start(client), time.monotonic()
        turn.expected = OUTPUT * turn.count * client.answer
        client.finish = turn.start + INPUT * turn.prompt + turn.expected
        self._running.add(turn)
        if turn.adapter is not None:
            self._adapters[turn.adapter] += 1

    def _leave(self, client: _Client, turn: Turn) -> None:
        self._running.discard(turn)
        client.sequences -= turn.count
        client.finish += OUTPUT * turn.used - turn.expected
        client.answer += LEARN * (turn.used / turn.count - client.answer)
        if turn.adapter is not None:
            self._adapters[turn.adapter] -= 1
            if not self._adapters[turn.adapter]:
                del self._adapters[turn.adapter]
        self._advance()

    async def _wait(self, client: _Client, turn: Turn) -> None:
        turn.entered = get_running_loop().create_future()
        client.line.append(turn)
        try:
            await turn.entered
        except CancelledError:
            if turn in self._running:
                self._leave(client, turn)
            elif turn in client.line:
                client.line.remove(turn)
                self._advance()
            raise

    def _advance(self) -> None:
        """Let those who come next go ahead, whoever has had the least first."""
        for client in sorted((c for c in self._clients.values() if c.line), key=lambda client: client.finish):
            while client.line and self._may_enter(client, client.line[0]):
                turn = client.line.popleft()
                assert turn.entered is not None
                if not turn.entered.done():
                    self._enter(client, turn)
                    turn.entered.set_result(None)
        if not self._running:  # nobody waits either
            self._now = 0.0
            self._clients.clear()
        elif len(self._clients) > MAX_CLIENTS:
            self._clients = {name: client for name, client in self._clients.items() if self._is_behind(client)}

    def _is_behind(self, client: _Client) -> bool:
        return bool(client.line or client.sequences or client.finish > self._now)


def take_turns(generate: Generate, turns: Turns) -> Generate:
    """vLLM's `generate` that waits for its client's turn; clients themselves have no say in priorities."""

    async def generate_in_turn(prompt: Any, params: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        urgency = PRIORITY_STEP * current_priority.get()
        name = current_client.get()
        if name is not None:
            turns.check(params.n)
        if name is None or dry_run.get():
            async with aclosing(generate(prompt, params, *args, **kwargs | {"priority": mark(-urgency)})) as outputs:
                async for output in outputs:
                    yield output
            return
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        lora = kwargs.get("lora_request")
        turn = Turn(name, params.n, len(ids or ()), None if lora is None else lora.lora_int_id)
        async with turns.hold(turn):
            # Smaller goes first; first come, first served among clients that have had the same.
            kwargs["priority"] = mark(int(turn.start) - urgency, alone=turn.alone)
            async with aclosing(generate(prompt, params, *args, **kwargs)) as outputs:
                async for output in outputs:
                    turns.begin(turn)
                    turn.used += sum(len(answer.token_ids) for answer in output.outputs)
                    yield output

    return generate_in_turn
