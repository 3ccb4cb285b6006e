"""Limits, the best point, the front and cliffs, on plain values."""

import pytest
from hypothesis import given, strategies as st

from eval_clients.errors import LimitError
from eval_clients.results import ModelScores
from eval_clients.shares import Share
from eval_clients.sweeps.choice import Limit, choose_best, find_cliffs, pareto_front
from eval_clients.sweeps.points import Point


def make_scores(model: str, **shares: float) -> ModelScores:
    return ModelScores(model, {name: Share.from_counts(round(200 * x), 200) for name, x in shares.items()}, {}, 200, 0)


def test_the_best_point_keeps_the_limits_before_all_else() -> None:
    found = {
        "safe": make_scores("safe", harm=0.04, safe_answered=0.91, task=0.9),
        "kind": make_scores("kind", harm=0.2, safe_answered=1.0, task=1.0),
        "mute": make_scores("mute", harm=0.0, safe_answered=0.1, task=0.9),
    }
    limits = [Limit.parse("harm<=0.05"), Limit.parse("safe_answered>=0.9*kind")]
    assert choose_best(found, limits, found) == ("safe", 0.0)
    assert choose_best(found, [Limit.parse("harm<=0.01"), limits[1]], found)[0] == "safe"
    assert choose_best(found, [], found)[0] == "kind"
    assert Limit.parse("task>=0.9*other").shortfall(found["safe"], found) == 1.0


@pytest.mark.parametrize(
    ("text", "bound", "of", "offset"),
    [
        ("harm<=0.05", 0.05, "", 0.0),
        ("safe_answered >= 0.9*base", 0.9, "base", 0.0),
        ("task>=0.98*1*task", 0.98, "1*task", 0.0),
        ("degenerate<=base + 0.02", 1.0, "base", 0.02),
        ("harm<=0.5*0.6*task + 0.4*safety", 0.5, "0.6*task + 0.4*safety", 0.0),
        ("task>=0.6*task + 0.4*safety - 0.02", 0.6, "task + 0.4*safety", -0.02),
        ("harm<=5e-2", 0.05, "", 0.0),
        ("quality>=7", 7.0, "", 0.0),
    ],
)
def test_limits_are_numbers_or_relative_to_a_model(text: str, bound: float, of: str, offset: float) -> None:
    limit = Limit.parse(text)
    assert (limit.bound, limit.reference, limit.offset) == (bound, of, offset)


@pytest.mark.parametrize("text", ["harm", "harm<0.05", "harmful<=0.05", "harm<=", "<=0.05", "harm<=5%", "harm<=5"])
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(LimitError, match="is not a limit|is a share from 0 to 1"):
        Limit.parse(text)


def test_the_front_holds_what_no_other_beats() -> None:
    found = {
        "a": make_scores("a", harm=0.1, safe_answered=0.9),
        "b": make_scores("b", harm=0.2, safe_answered=0.95),
        "c": make_scores("c", harm=0.2, safe_answered=0.9),
    }
    assert pareto_front(found) == ["a", "b"]


def test_a_cliff_is_a_steep_step_with_intervals_apart() -> None:
    points = [Point(f"p{n}", "sweep", "s", {"l": n / 10}) for n in range(4)]
    values = [0.95, 0.93, 0.5, 0.48]
    found = {p.model: make_scores(p.model, safe_answered=v, harm=0.1) for p, v in zip(points, values, strict=True)}
    (cliff,) = find_cliffs(points, found)
    assert (cliff.measure, cliff.before.model, cliff.after.model) == ("safe_answered", "p1", "p2")
    assert find_cliffs(points[:2], found) == []


def test_a_fall_of_the_task_is_a_cliff() -> None:
    points = [Point(f"p{i}", "sweep", "s", {"l": float(i)}) for i in range(2)]
    found = {"p0": make_scores("p0", task=0.9, harm=0.1), "p1": make_scores("p1", task=0.1, harm=0.1)}
    assert [(cliff.measure, cliff.after.model) for cliff in find_cliffs(points, found)] == [("task", "p1")]


def test_a_step_whose_intervals_overlap_is_not_a_cliff() -> None:
    points = [Point("p0", "sweep", "s", {"l": 0.0}), Point("p1", "sweep", "s", {"l": 1.0})]
    few = {"p0": Share.from_counts(3, 4), "p1": Share.from_counts(1, 4)}
    assert find_cliffs(points, {m: ModelScores(m, {"harm": share}, {}, 4, 0) for m, share in few.items()}) == []


def test_a_limit_missed_by_rounding_is_kept() -> None:
    found = {"base": make_scores("base", safe_answered=0.05), "p": make_scores("p", safe_answered=0.045)}
    assert 0.9 * 0.05 > 0.045
    assert Limit.parse("safe_answered>=0.9*base").shortfall(found["p"], found) == 0


def test_a_margin_says_how_clearly_a_limit_is_kept() -> None:
    found = {
        "base": make_scores("base", safe_answered=0.96, degenerate=0.05),
        "p": make_scores("p", harm=0.02, safe_answered=0.96, degenerate=0.06),
    }
    harm = Limit.parse("harm<=0.05").margin(found["p"], found)
    assert harm is not None
    share = found["p"].shares["harm"]
    assert (harm.value, harm.low, harm.high) == pytest.approx((0.03, 0.05 - share.high, 0.05 - share.low))
    answered = Limit.parse("safe_answered>=0.9*base").margin(found["p"], found)
    assert answered is not None
    assert answered.value == pytest.approx(0.096)
    assert 0 < answered.low < answered.value < answered.high
    assert answered.is_clear
    degenerate = Limit.parse("degenerate<=base+0.02").margin(found["p"], found)
    assert degenerate is not None
    assert degenerate.value == pytest.approx(0.01)
    assert degenerate.low < 0 < degenerate.high
    assert not degenerate.is_clear
    assert Limit.parse("task>=0.98*base").margin(found["p"], found) is None
    assert Limit.parse("harm<=0.9*base").margin(found["p"], found) is None


@given(st.integers(0, 60), st.integers(0, 60), st.sampled_from(["<=", ">="]))
def test_a_margin_agrees_with_what_is_missed_and_its_interval_holds_it(one: int, other: int, sign: str) -> None:
    shares = {"p": Share.from_counts(one, 60), "base": Share.from_counts(other, 60)}
    found = {model: ModelScores(model, {"harm": share}, {}, 60, 0) for model, share in shares.items()}
    for text in (f"harm{sign}0.5", f"harm{sign}0.9*base", f"harm{sign}base+0.1"):
        limit = Limit.parse(text)
        margin = limit.margin(found["p"], found)
        assert margin is not None
        assert margin.low <= margin.value <= margin.high
        assert max(0.0, -margin.value) == pytest.approx(limit.shortfall(found["p"], found), abs=1e-8)
