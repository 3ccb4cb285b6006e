"""No limit is exceeded and nothing stays reserved: random schedules of requests against a simple model."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.ledger import MAX_METERS, WINDOW_S, Hold, Kind, Ledger, OverLimitError
from tests.service.clock import Clock

LIMITS = {"key one": 10, "key two": 7, "tenant t": 12}
KEYS = ("key one", "key two")


@dataclass(eq=False)
class Request:
    """One that runs: what it has used of what it reserved."""

    hold: Hold
    subjects: tuple[str, ...]
    amount: int
    used: int = 0


class Schedule(RuleBasedStateMachine):
    """Requests of two keys of one tenant that begin, use some of what they reserved, and end, one way or another."""

    kind: Kind = "tokens"

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.ledger = Ledger(now=self.clock)
        self.running: list[Request] = []
        self.uses: list[tuple[float, str, int]] = []
        self.settled: list[tuple[float, str, int]] = []

    def counted(self, subject: str) -> int:
        """What counts against a limit, as the docs say."""
        held = sum(request.amount for request in self.running if subject in request.subjects)
        since = [(math.floor(at) + 1 + WINDOW_S, amount) for at, name, amount in self.settled if name == subject]
        return held + sum(amount for until, amount in since if until > self.clock.now)

    @rule(key=st.sampled_from(KEYS), amount=st.integers(1, 13))
    def begin(self, key: str, amount: int) -> None:
        subjects = (key, "tenant t")
        full = [name for name in subjects if self.counted(name) + amount > LIMITS[name]]
        limits = {name: LIMITS[name] for name in subjects}
        if not full:
            self.running.append(Request(self.ledger.take(self.kind, limits, amount), subjects, amount))
            return
        with pytest.raises(OverLimitError) as caught:
            self.ledger.take(self.kind, limits, amount)
        assert caught.value.subject == full[0]
        assert (caught.value.wait_s is None) == (amount > LIMITS[full[0]])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.running))
        part = data.draw(st.sampled_from([0, 1, request.amount]))
        part = min(part, request.amount - request.used)
        request.used += part
        self.uses += [(self.clock.now, subject, part) for subject in request.subjects]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.running))
        self.running.remove(request)
        request.hold.settle(request.used)
        request.hold.settle(request.amount)  # a second end is none
        self.settled += [(self.clock.now, subject, request.used) for subject in request.subjects]

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 7.0, WINDOW_S / 2, WINDOW_S - 1.5, WINDOW_S - 0.5, WINDOW_S + 0.5]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def no_minute_exceeds_a_limit(self) -> None:
        for end in {at for at, _, _ in self.uses}:
            for subject, limit in LIMITS.items():
                used = sum(part for at, name, part in self.uses if name == subject and end - WINDOW_S < at <= end)
                assert used <= limit

    def teardown(self) -> None:
        for request in self.running:
            request.hold.settle(0)
        self.clock.now += WINDOW_S + 1
        for subject, limit in LIMITS.items():
            self.ledger.take(self.kind, {subject: limit}, limit).settle(0)
        self.ledger.forget_idle()
        assert not self.ledger.meters, "nothing stays reserved"


TestSchedules = Schedule.TestCase
TestSchedules.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_when_to_come_again_is_when_there_is_room() -> None:
    clock = Clock()
    ledger = Ledger(now=clock)
    for amount in (4, 3, 2):
        ledger.take("tokens", {"a": 10}, amount).settle(amount)
        clock.now += 10
    with pytest.raises(OverLimitError) as caught:
        ledger.take("tokens", {"a": 10}, 6)
    assert caught.value.wait_s is not None
    assert 0 < caught.value.wait_s <= WINDOW_S
    clock.now += caught.value.wait_s - 1.01
    with pytest.raises(OverLimitError):
        ledger.take("tokens", {"a": 10}, 6)
    clock.now += 1.01
    ledger.take("tokens", {"a": 10}, 6).settle(0)


def test_what_depends_on_requests_that_run_has_no_time() -> None:
    ledger = Ledger(now=Clock())
    held = ledger.take("concurrent", {"a": 1}, 1)
    with pytest.raises(OverLimitError) as caught:
        ledger.take("concurrent", {"a": 1}, 1)
    assert caught.value.wait_s == 0
    held.settle(0)
    ledger.take("concurrent", {"a": 1}, 1)


def test_subjects_that_are_idle_are_forgotten_and_others_are_not() -> None:
    clock = Clock()
    ledger = Ledger(now=clock)
    holds = [ledger.take("tokens", {f"key {number}": 5}, 5) for number in range(3)]
    for number in range(2 * MAX_METERS):
        ledger.take("requests", {f"key {number}": 5}, 1).settle(0)
    assert len(ledger.meters) <= MAX_METERS + 1
    for number in range(3):
        with pytest.raises(OverLimitError):
            ledger.take("tokens", {f"key {number}": 5}, 1)
    for hold in holds:
        hold.settle(0)
