"""What operators see of requests: by profile, by rule, by stack, and which weights of adapters with a floor acted."""

from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service.callers import Caller
from service.ledger import Ledger
from service.metrics import Metrics
from service.policy import Policy
from service.policy_rules import Rules
from service.read_series import Mixes
from tests.service.intakes import CHAT, make_setup
from tests.service.policies import make_policy

MESSAGES = [{"role": "user", "content": "x"}]


def test_mixes_are_counted_by_stack_while_they_run_and_within_a_minute() -> None:
    time = [0.0]
    mixes = Mixes(lambda: time[0])
    for vector in ("a", "a", "b"):
        mixes.begin("1" * 64, vector)
    mixes.begin("2" * 64, "c")
    assert dict(mixes.list_running()) == {("1" * 12,): 2, ("2" * 12,): 1}
    mixes.end("1" * 64, "a")
    assert dict(mixes.list_running())["1" * 12,] == 2
    mixes.end("1" * 64, "a")
    mixes.end("2" * 64, "c")
    assert dict(mixes.list_running()) == {("1" * 12,): 1}
    assert [*mixes.count_seen()] == [((), 3)]
    time[0] = 59
    mixes.see("d")
    time[0] = 60
    assert [*mixes.count_seen()] == [((), 1)]
    mixes.see("d")
    assert [*mixes.count_seen()] == [((), 1)]


def test_limits_are_shown_by_the_subject_that_uses_most_without_its_name() -> None:
    time = [0.0]
    ledger = Ledger(now=lambda: time[0])
    ledger.take("tokens", {"key secret": 100, "tenant acme": 1000}, 50).settle(20)
    held = ledger.take("tokens", {"key other": 100}, 75)
    assert dict(ledger.list_used()) == {("key", "tokens"): 0.75, ("tenant", "tokens"): 0.02}
    held.settle(0)
    assert dict(ledger.list_used())["key", "tokens"] == 0.2
    time[0] = 100
    assert dict(ledger.list_used()) == {("key", "tokens"): 0, ("tenant", "tokens"): 0}


@pytest.fixture
def setup(tmp_path: Path) -> Any:
    return make_setup(tmp_path)


def value(setup: Any, name: str, **labels: str) -> float | None:
    found: float | None = setup.series.get_sample_value(name, labels)
    return found


def test_a_profile_has_its_times_and_how_it_was_served(setup: Any) -> None:
    for _ in range(3):
        assert setup.post({"model": "short", "messages": MESSAGES}).status_code == 200
    for name in ("fusion_request_seconds", "fusion_queue_seconds"):
        assert value(setup, f"{name}_count", profile="short") == 3
    assert value(setup, "fusion_served_total", profile="short", mode="mixed", source="warm") == 3
    assert value(setup, "fusion_distinct_mixes") == 1
    assert value(setup, "fusion_stack_requests", kind="stack") == 0


def test_all_series_of_a_deleted_profile_go() -> None:
    series = CollectorRegistry()
    metrics = Metrics(series)
    for histogram in (metrics.first_token, metrics.gaps, metrics.request_seconds, metrics.queue_seconds):
        histogram.observe("p", 1)
        histogram.observe("q", 1)
    for profile in "pq":
        metrics.requests.labels(profile, "200").inc()
        metrics.tokens.labels(profile, "prompt").inc()
        metrics.served.labels(profile, "mixed", "warm").inc()
    metrics.forget("p")
    profiles = [s.labels["profile"] for m in series.collect() for s in m.samples if "profile" in s.labels]
    assert set(profiles) == {"q"}


FLOOR = {"floor": [{"adapter": "a", "at_least": 0.5, "id": "safe"}], "exempt": "admin", "base": {"role": "user"}}


@pytest.fixture
def guarded(setup: Any) -> Any:
    metrics = setup.intake._metrics  # noqa: SLF001 - the series of this setup
    rules = Rules.model_validate(FLOOR)
    setup.intake._policy = Policy(rules, setup.names.registry, max_rank=64, record=metrics.record_rule)  # noqa: SLF001
    metrics.set_floor("a", 0.5)
    return setup


@pytest.mark.parametrize(
    ("model", "least"), [("0.7*a + 1*b", 0.7), ("b", 0.0), ("0.75*a@answer(0.6)", None), ("short", 1.0), ("a*-1", -1.0)]
)
def test_the_least_weight_that_ran_is_counted_also_of_those_no_rule_is_about(
    guarded: Any, model: str, least: float | None
) -> None:
    answer = guarded.post({"model": model, "messages": MESSAGES})
    if least is None or answer.status_code != 200:
        assert value(guarded, "fusion_floor_weight_count", adapter="a") is None
        return
    assert value(guarded, "fusion_floor_weight_count", adapter="a") == 1
    assert value(guarded, "fusion_floor_weight_sum", adapter="a") == pytest.approx(least)
    assert value(guarded, "fusion_floor_misses_total", adapter="a") == (least < 0.5)


@pytest.mark.parametrize(("role", "misses"), [("user", 0), ("admin", 1)])
def test_the_base_alone_is_a_miss_only_of_whom_no_rule_is_about(guarded: Any, role: Any, misses: int) -> None:
    guarded.caller = Caller("k", role)
    assert guarded.post({"model": guarded.names.base, "messages": MESSAGES}, CHAT).status_code == 200
    assert value(guarded, "fusion_floor_weight_count", adapter="a") == 1
    assert value(guarded, "fusion_floor_misses_total", adapter="a") == misses


def test_refusals_are_counted_by_rule(guarded: Any) -> None:
    guarded.caller = Caller("k", "user")
    for _ in range(2):
        assert guarded.post({"model": "0.4*a", "messages": MESSAGES}, CHAT).status_code == 403
    assert value(guarded, "fusion_policy_refusals_total", rule="safe") == 2
    assert value(guarded, "fusion_floor_weight_count", adapter="a") is None
    assert make_policy(guarded.names.registry).floor_weights.find(None) == {}
