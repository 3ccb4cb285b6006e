"""Tokens that a request may use, reserved before the engine computes any of them, and settled with what it did.

Here, and not before, the tokens of the prompt are known, and how many answers there may be of which length. What was
computed is read from vLLM's own count of each sequence: also when nobody has taken it from there, as of a client that
has left.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Protocol

from vllm.exceptions import GracefulHTTPError

from service.engine.dry_run import dry_run
from service.engine.models import Generate
from service.engine.supported import require


class BudgetError(GracefulHTTPError):
    """A request may not use so many tokens. vLLM answers its base class with the status and the message."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, HTTPStatus(status))


class Reservation(Protocol):
    """Tokens that are reserved."""

    def settle(self, used: int) -> None:
        """Count what was used in their place."""


class Budget(Protocol):
    """The tokens that a request may use."""

    async def reserve(self, tokens: int) -> Reservation:
        """Reserve so many; `BudgetError` when they may not be used."""


budget: ContextVar[Budget | None] = ContextVar("fusion_budget", default=None)
"""That of the request at hand; None: nothing limits it."""


@dataclass(slots=True)
class _Charge:
    """What one generation computes: vLLM's counts of its sequences."""

    sequences: list[Any] = field(default_factory=list)

    def count(self, prompt: int) -> int:
        """Tokens of the prompt and of the answers, once the engine has the request."""
        return prompt + sum(sequence.num_output_tokens() for sequence in self.sequences) if self.sequences else 0


_charge: ContextVar[_Charge | None] = ContextVar("fusion_charge", default=None)


def watch_sequences(processor: Any) -> None:
    """Have vLLM's output `processor` show the sequences of a generation to what counts them."""
    require(processor, "add_request", "request_states")
    add = processor.add_request

    def add_request(request: Any, *args: Any, **kwargs: Any) -> None:
        add(request, *args, **kwargs)
        charge, state = _charge.get(), processor.request_states.get(request.request_id)
        if charge is not None and state is not None:
            require(state, "detokenizer")
            charge.sequences.append(state.detokenizer)

    processor.add_request = add_request


def reserve_tokens(generate: Generate, longest: int) -> Generate:
    """vLLM's `generate` that reserves all that a generation may use before it waits for anything, and settles it when
    it ends, however it does; prompt and answer have `longest` tokens together at most.
    """

    def reserved(prompt: Any, params: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        tokens = budget.get()
        if tokens is None or dry_run.get() is not None:
            return generate(prompt, params, *args, **kwargs)
        return within(tokens, prompt, params, *args, **kwargs)

    async def within(tokens: Budget, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        length = count_prompt(prompt, longest)
        answer = max(1, longest - length)
        answer = answer if params.max_tokens is None else min(answer, params.max_tokens)
        most = length + params.n * answer
        reservation, charge = await tokens.reserve(most), _Charge()
        _charge.set(charge)
        try:
            async with aclosing(generate(prompt, params, *args, **kwargs)) as outputs:
                async for output in outputs:
                    yield output
        finally:
            reservation.settle(min(most, charge.count(length)))  # a gate's pass adds a token

    return reserved


def count_prompt(prompt: Any, longest: int) -> int:
    """The tokens of a prompt as vLLM's routes give it to the engine; `longest` when it does not show them."""
    if isinstance(prompt, dict):
        for key in ("prompt_token_ids", "prompt_embeds"):
            if (tokens := prompt.get(key)) is not None:
                return len(tokens)
    return longest
