"""Tokens are reserved before the engine computes any, and settled with what it did, however a request ends."""

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service.callers import Caller
from service.engine.budgets import BudgetError, budget, count_prompt, reserve_tokens, watch_sequences
from service.engine.dry_run import dry_run
from service.errors import ApiError
from service.ledger import WINDOW_S, Hold, Ledger
from service.limits import Account, Limits, read_limits
from service.metrics import Metrics

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]
LIMIT, LONGEST = 400, 64
ENDS = ("whole", "stop", "client gone", "engine dies", "refused", "canceled")


class Processor:
    """vLLM's output processor, as far as it is watched: the state of every sequence."""

    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}

    def add_request(self, request: Any) -> None:
        tokens: list[int] = []
        sequence = SimpleNamespace(num_output_tokens=lambda: len(tokens), tokens=tokens)
        self.request_states[request.request_id] = SimpleNamespace(detokenizer=sequence)


class Engine:
    """Computes a token of every sequence at a time, and tells of some of them later, as vLLM's merging queue does."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.processor = Processor()
        watch_sequences(self.processor)
        self.generate = reserve_tokens(self._generate, LONGEST)
        self.computed = 0
        self.number = 0

    async def _generate(self, prompt: Any, params: Any, end: str) -> AsyncGenerator[Any, None]:
        await asyncio.sleep(0.001 * self.random.random())  # in line
        if end == "refused":
            raise ValueError("no such parameter")
        ids = [f"{self.number}-{i}" for i in range(params.n)]
        self.number += 1
        for id_ in ids:
            self.processor.add_request(SimpleNamespace(request_id=id_))
        sequences = [self.processor.request_states.pop(id_).detokenizer.tokens for id_ in ids]
        self.computed += len(prompt["prompt_token_ids"])
        longest = min(params.max_tokens, LONGEST - len(prompt["prompt_token_ids"]))
        length = longest if end == "whole" else self.random.randint(1, longest)
        for number in range(length):
            await asyncio.sleep(0)
            for tokens in sequences:
                tokens.append(number)
            self.computed += len(sequences)
            if end == "engine dies" and number == length // 2:
                raise RuntimeError("the engine died")
            if self.random.random() < 0.5:
                yield SimpleNamespace()

    async def ask(self, account: Account, prompt: int, max_tokens: int, n: int, end: str) -> str:
        """What became of a request."""
        budget.set(Direct(account))
        params = SimpleNamespace(max_tokens=max_tokens, n=n)
        try:
            async with aclosing(self.generate({"prompt_token_ids": [0] * prompt}, params, end)) as outputs:
                async for _ in outputs:
                    if end == "client gone":
                        return "left"
        except BudgetError as error:
            return str(error.http_status.value)
        except (RuntimeError, ValueError) as error:
            return type(error).__name__
        return "answered"


class Direct:
    """A budget whose refusals are those of the account."""

    def __init__(self, account: Account) -> None:
        self._account = account

    async def reserve(self, tokens: int) -> Hold:
        try:
            return await self._account.take("tokens", tokens)
        except ApiError as error:
            raise BudgetError(error.message, error.status) from error


def make_limits(now: Any) -> tuple[Limits, Ledger]:
    ledger = Ledger(now=now)
    table = read_limits({"default": {"tokens": LIMIT}, "tenant": {"tokens": 2 * LIMIT}})
    return Limits(table, ledger, Metrics(CollectorRegistry())), ledger


@pytest.mark.parametrize("seed", range(8))
async def test_no_schedule_exceeds_a_limit_or_leaves_a_token_reserved(seed: int) -> None:
    now, rng, engine = [0.0], random.Random(seed), Engine(seed)
    limits, ledger = make_limits(lambda: now[0])
    outcomes: set[str] = set()

    async def one(key: str) -> None:
        account = limits.find_account(Caller(key, "user", "acme"))
        assert account is not None
        for _ in range(12):
            end = rng.choice(ENDS)
            await asyncio.sleep(0.002 * rng.random())
            work = asyncio.create_task(
                engine.ask(account, rng.randint(1, 20), rng.randint(1, 60), rng.randint(1, 3), end)
            )
            if end == "canceled":
                await asyncio.sleep(0.002 * rng.random())
                work.cancel()
            with suppress(asyncio.CancelledError):
                outcomes.add(await work)

    async def look() -> None:
        while True:
            assert engine.computed <= 2 * LIMIT, "all of it was computed in one minute"
            for key in ("one", "two", "three"):
                assert ledger.find((f"key {key}", "tokens")).used <= LIMIT
            assert ledger.find(("tenant acme", "tokens")).used <= 2 * LIMIT
            await asyncio.sleep(0)

    watch = asyncio.create_task(look())
    await asyncio.gather(*(one(key) for key in ("one", "two", "three") for _ in range(4)))
    assert not watch.done()
    watch.cancel()
    assert engine.computed == ledger.find(("tenant acme", "tokens")).used, "what was computed is what counts"
    assert {"429", "answered"} <= outcomes
    now[0] += WINDOW_S + 1
    ledger.forget_idle()
    assert not ledger.meters


async def test_what_was_computed_for_a_client_that_did_not_read_counts() -> None:
    limits, ledger = make_limits(lambda: 0.0)
    engine = Engine(3)
    account = limits.find_account(Caller("one", "user", "acme"))
    assert account is not None
    assert await engine.ask(account, 5, 50, 3, "client gone") == "left"
    used = ledger.find(("key one", "tokens")).used
    assert used == engine.computed > 5


async def test_a_request_that_never_fits_is_told_so_and_one_without_a_limit_is_not_counted() -> None:
    limits, ledger = make_limits(lambda: 0.0)
    engine = Engine(0)
    account = limits.find_account(Caller("one", "user", "acme"))
    assert account is not None
    assert await engine.ask(account, 10, 60, 8, "whole") == "400", "10 + 8 * 54 tokens, of 400"
    assert await engine.ask(account, 10, 60, 3, "whole") == "answered"
    budget.set(None)
    async for _ in engine.generate({"prompt_token_ids": [1]}, SimpleNamespace(max_tokens=3, n=1), "whole"):
        pass
    assert ledger.find(("key one", "tokens")).used == engine.computed - 4


async def test_a_dry_run_reserves_nothing() -> None:
    limits, ledger = make_limits(lambda: 0.0)
    account = limits.find_account(Caller("one", "user", "acme"))
    assert account is not None
    budget.set(Direct(account))
    dry_run.set(asyncio.Event())
    async for _ in Engine(0).generate({"prompt_token_ids": [1]}, SimpleNamespace(max_tokens=3, n=1), "whole"):
        pass
    assert not ledger.meters


async def test_a_prompt_that_does_not_show_its_tokens_counts_as_the_longest() -> None:
    assert count_prompt({"prompt_token_ids": [1, 2]}, LONGEST) == 2
    assert count_prompt({"prompt_embeds": [[0.0], [0.0], [0.0]]}, LONGEST) == 3
    assert count_prompt("text", LONGEST) == LONGEST
