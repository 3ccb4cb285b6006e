"""Limits that replicas share: random schedules with crashes against a simple model, and real replicas of PostgreSQL."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from anyio.to_thread import run_sync
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from prometheus_client import CollectorRegistry
from sqlalchemy import create_engine, text

from service import shares as shares_module
from service.callers import Caller
from service.errors import ApiError
from service.ledger import WINDOW_S, Hold, Key, Ledger, OverLimitError, ShareError
from service.limits import Account, Limits, read_limits
from service.metrics import Metrics
from service.registry import Registry
from service.shares import LEASE_S, Shares, apply_shares, divide, plan_shares
from tests.service.clock import Clock
from tests.service.databases import Postgres
from tests.service.replicas import Line

LIMIT, SUBJECT = 24, "key one"
KEY: Key = (SUBJECT, "tokens")
ROW_S = LEASE_S + WINDOW_S + 1


@dataclass(eq=False)
class Request:
    """One that runs: what it has used of what it reserved."""

    hold: Hold
    amount: int
    used: int = 0


@dataclass
class Replica:
    """One of them."""

    ledger: Ledger
    running: list[Request] = field(default_factory=list)


class Replicas(RuleBasedStateMachine):
    """Replicas that ask for shares, die, are started again, and lose answers of the database after it has committed."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.rows: dict[tuple[Key, str], tuple[int, float]] = {}
        self.replicas: dict[str, Replica] = {}
        self.uses: list[tuple[float, int]] = []
        self.number = 0

    @initialize(count=st.integers(1, 3))
    def start(self, count: int) -> None:
        for _ in range(count):
            self.number += 1
            self.replicas[str(self.number)] = Replica(Ledger(share=0, now=self.clock))

    def renew(self, name: str, need: int, *, is_lost: bool) -> None:
        """What `Shares` does, on a table in memory."""
        ledger = self.replicas[name].ledger
        ledger.forget_idle()
        plans = plan_shares(ledger, {KEY: (LIMIT, need)} if need else {})
        self.rows = {key: row for key, row in self.rows.items() if row[1] > self.clock.now}
        granted = divide([(key, holder, amount) for (key, holder), (amount, _) in self.rows.items()], name, plans)
        self.rows |= {(key, name): (amount, self.clock.now + ROW_S) for key, amount in granted.items()}
        if not is_lost:
            apply_shares(ledger, granted, self.clock.now + LEASE_S)

    @rule(data=st.data(), amount=st.sampled_from([1, 5, LIMIT // 2, LIMIT]), is_lost=st.booleans())
    def begin(self, data: st.DataObject, amount: int, is_lost: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.replicas)))
        replica = self.replicas[name]
        for attempt in range(2):
            try:
                hold = replica.ledger.take("tokens", {SUBJECT: LIMIT}, amount)
            except ShareError:
                if not attempt:
                    self.renew(name, amount, is_lost=is_lost)
            except OverLimitError:
                return
            else:
                replica.running.append(Request(hold, amount))
                return
        others = sum(row[0] for (_, holder), row in self.rows.items() if holder != name)
        assert is_lost or others + replica.ledger.find(KEY).used + amount > LIMIT, "what nobody else has can be had"

    @rule(data=st.data(), part=st.sampled_from([1, LIMIT // 2, LIMIT]), ends=st.booleans())
    def use(self, data: st.DataObject, part: int, ends: bool) -> None:
        replica = self.replicas[data.draw(st.sampled_from(sorted(self.replicas)))]
        for request in replica.running[:1]:
            part = min(part, request.amount - request.used)
            request.used += part
            self.uses.append((self.clock.now, part))
            if ends:
                request.hold.settle(request.used)
                replica.running.remove(request)

    @rule(seconds=st.sampled_from([0.0, 0.5, 2.0, LEASE_S - 0.5]), is_lost=st.booleans())
    def wait(self, seconds: float, is_lost: bool) -> None:
        """Time passes, and replicas renew, of which one may not hear the answer."""
        self.clock.now += seconds
        for number, name in enumerate(sorted(self.replicas)):
            self.renew(name, 0, is_lost=is_lost and number == 0)

    @rule(seconds=st.sampled_from([LEASE_S, LEASE_S + 1, WINDOW_S / 2, WINDOW_S - 0.5, WINDOW_S, ROW_S - 0.5, ROW_S]))
    def wait_without_a_database(self, seconds: float) -> None:
        for replica in self.replicas.values():  # requests may outlive a lease: `docs/limits.md` says so
            for request in replica.running:
                request.hold.settle(request.used)
            replica.running.clear()
        self.clock.now += seconds

    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        del self.replicas[data.draw(st.sampled_from(sorted(self.replicas)))]
        self.start(1)

    @invariant()
    def no_minute_exceeds_the_limit(self) -> None:
        for end in {at for at, _ in self.uses}:
            assert sum(part for at, part in self.uses if end - WINDOW_S < at <= end) <= LIMIT

    @invariant()
    def shares_fit_the_limit(self) -> None:
        assert sum(amount for amount, until in self.rows.values() if until > self.clock.now) <= LIMIT

    def teardown(self) -> None:
        for replica in self.replicas.values():
            for request in replica.running:
                request.hold.settle(0)
        for _ in range(40):
            self.clock.now += LEASE_S / 2
            for name in self.replicas:
                self.renew(name, 0, is_lost=False)
        assert not any(replica.ledger.meters for replica in self.replicas.values()), "nothing stays reserved"
        assert not [row for row in self.rows.values() if row[1] > self.clock.now], "and no share stays taken"
        for name, replica in list(self.replicas.items())[:1]:
            self.renew(name, LIMIT, is_lost=False)
            replica.ledger.take("tokens", {SUBJECT: LIMIT}, LIMIT)


TestReplicas = Replicas.TestCase
TestReplicas.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_what_is_given_up_is_not_used_while_the_answer_is_under_way() -> None:
    clock = Clock()
    ledger = Ledger(share=0, now=clock)
    apply_shares(ledger, {KEY: LIMIT}, clock.now + LEASE_S)
    ledger.take("tokens", {SUBJECT: LIMIT}, 2)
    assert plan_shares(ledger, {})[KEY].amount == 2 + (LIMIT - 2) // 2
    with pytest.raises(ShareError):  # the others may have it, whether this one hears of it or not
        ledger.take("tokens", {SUBJECT: LIMIT}, LIMIT // 2 + 1)


TABLE = {"default": {"tokens": 400, "concurrent": 6}, "tenant": {"requests": 90}}


@dataclass
class Server:
    """A replica's limits on a real database."""

    registry: Registry
    limits: Limits
    shares: Shares

    def account(self, key: str = "one") -> Account:
        account = self.limits.find_account(Caller(key, "user", "acme"))
        assert account is not None
        return account

    async def count(self, kind: str, amount: int, tries: int) -> int:
        """How many of so many attempts to use an amount succeed."""
        count = 0
        for _ in range(tries):
            with suppress(ApiError):
                (await self.account().take(kind, amount)).settle(amount)  # type: ignore[arg-type]  # a kind
                count += 1
        return count

    async def take_place(self) -> Hold:
        """A place that may be another replica's, which gives it back when it renews its shares."""
        while True:
            with suppress(ApiError):
                return await self.account().take("concurrent")
            await asyncio.sleep(0.1)


@asynccontextmanager
async def run_server(url: str, timeout_s: float = 5) -> AsyncIterator[Server]:
    registry = await run_sync(lambda: Registry(url, timeout_s=timeout_s, shared=True))
    async with AsyncExitStack() as stack:
        stack.callback(registry.close)
        shares = Shares(registry, registry.ledger)
        limits = Limits(read_limits(TABLE), registry.ledger, Metrics(CollectorRegistry()), shares)
        task = asyncio.create_task(limits.watch())
        stack.callback(task.cancel)
        yield Server(registry, limits, shares)


@pytest.mark.anyio
@pytest.mark.usefixtures("time_limit")
async def test_replicas_share_a_limit_and_none_is_lost_while_they_live(postgres: Postgres) -> None:
    with postgres.fresh() as url:
        async with run_server(url) as one, run_server(url) as two, run_server(url) as three:
            servers = (one, two, three)
            counts = await asyncio.gather(*(server.count("tokens", 10, 40) for server in servers))
            assert 400 - 3 * 400 // shares_module.SPARE <= 10 * sum(counts) <= 400, counts
            with pytest.raises(ApiError) as caught:
                await one.account().take("tokens", 10)
            assert (caught.value.status, caught.value.headers["retry-after"]) == (429, "5")
            assert "other replicas use what is left of it" in caught.value.message
            holds = [await server.take_place() for server in servers for _ in range(2)]
            with pytest.raises(ApiError):
                await two.account().take("concurrent")
            holds.pop(0).settle(0)
            holds.append(await two.take_place())
            for hold in holds:
                hold.settle(0)


@pytest.mark.anyio
@pytest.mark.usefixtures("time_limit")
async def test_a_request_costs_no_query_while_a_share_lasts(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares_module, "RENEW_S", 1000)
    with postgres.fresh() as url:
        async with run_server(url) as one:
            await one.count("requests", 1, 1)
            asked = count_calls(one)
            began = time.monotonic()
            assert await one.count("requests", 1, 40) == 40
            assert not asked
            assert time.monotonic() - began < 1


def count_calls(server: Server) -> list[object]:
    """Grows with every transaction of a server."""
    calls: list[object] = []
    transact = server.registry.transact

    def count(call: Callable[[Any], Any]) -> Any:
        calls.append(call)
        return transact(call)

    server.registry.transact = count  # type: ignore[method-assign]  # watched
    return calls


@pytest.mark.anyio
@pytest.mark.usefixtures("time_limit")
async def test_a_replica_that_is_cut_off_uses_its_share_and_then_refuses(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares_module, "LEASE_S", 2.0)
    with postgres.fresh() as url:
        line = Line(url, Path(tmp_path_factory.mktemp("line")))
        await line.mend()
        async with run_server(line.url, timeout_s=1) as cut, run_server(url) as other:
            assert await cut.count("tokens", 100, 1) == 1
            await line.cut()
            assert await cut.count("tokens", 10, 1) == 1, "it has a share of 250"
            await asyncio.sleep(2.1)
            with pytest.raises(ApiError) as caught:
                await cut.account().take("tokens", 10)
            assert caught.value.status == 503
            left = await other.count("tokens", 10, 40)
            assert left == (400 - 250) // 10, "what the other has may still be used there"
            engine = create_engine(url)
            with engine.begin() as connection:  # a minute and the lease later
                connection.execute(text("UPDATE limit_shares SET until = now() - interval '1 second' WHERE amount > 0"))
            engine.dispose()
            await asyncio.sleep(shares_module.ASK_AGAIN_S)
            await other.shares.ask({(SUBJECT, "tokens"): (400, 200)})
            assert await other.count("tokens", 10, 40) > 0
