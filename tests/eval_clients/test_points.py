"""Points, controls, limits and choice, on plain values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eval_clients.results import Answers, Line, Row
from eval_clients.shares import Share
from eval_clients.sweeps.choice import Limit, LimitError, best, cliffs, front
from eval_clients.sweeps.controls import randomised, replaced, terms, uses, without
from eval_clients.sweeps.points import Point, TemplateError, expand, grid, value
from eval_clients.sweeps.report import HALVES, beside, verdict
from eval_clients.sweeps.sweep import Sweep, spread


def line(model: str, **shares: float) -> Line:
    return Line(model, {name: Share.of(round(200 * x), 200) for name, x in shares.items()}, {}, 200, 0)


def test_a_grid_holds_both_ends_and_exact_steps() -> None:
    assert grid("l=0:1:0.1")[1] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    assert grid("l=1:0:-0.5") == ("l", [1, 0.5, 0])
    assert grid("w = 0.3,1") == ("w", [0.3, 1])


def test_a_template_is_filled_with_short_numbers_and_repeats_nothing() -> None:
    points = expand(["{1-l}*task + {l}*safety", "1*task"], ["l=0:1:0.1"])
    assert len(points) == 12 and points[3].model == "0.7*task + 0.3*safety" and points[3].values == {"l": 0.3}
    assert expand(["{l*2}*a", "{2*l}*a"], ["l=1,1"])[0].model == "2*a"


def test_a_recipes_own_braces_stay() -> None:
    assert expand(["{*.mlp.*: 0.2, *: 0.6}*safety + {t}*task"], ["t=1"])[0].model.startswith("{*.mlp.*: 0.2, *: 0.6}*")


@pytest.mark.parametrize(
    ("templates", "grids", "message"),
    [
        (["{l}*a"], [], "has no grid"),
        (["1*a"], ["l=0:1:0.1"], "is used in no recipe"),
        (["{l}*a"], ["l=0:1:-0.1"], "FIRST:LAST:STEP"),
        (["{l}*a"], ["l=0:x:1"], "is no number"),
        (["{l}*a"], ["l=1", "l=2"], "twice"),
        (["{l/0}*a"], ["l=1"], "cannot be computed"),
        (["{__import__('os')}*a"], [], "numbers, grid variables"),
        (["{9**9**9**9}*a"], [], "cannot be computed"),
        (["{l}*a"], ["l=0:1:0.00001"], "at most"),
    ],
)
def test_bad_templates_are_refused_with_a_reason(templates: list[str], grids: list[str], message: str) -> None:
    with pytest.raises(TemplateError, match=message.replace("(", r"\(")):
        expand(templates, grids)


@given(st.floats(-4, 4), st.floats(-4, 4))
def test_expressions_are_arithmetic(a: float, b: float) -> None:
    assert math.isclose(value("1 - a*(b + 2)", {"a": a, "b": b}), 1 - a * (b + 2), abs_tol=1e-9)


def test_controls_of_a_plain_sum() -> None:
    assert [(t.weight, t.name) for t in terms("0.6*task + -1e-1*b+c")] == [(0.6, "task"), (-0.1, "b"), (1, "c")]
    assert terms("ties(1*a + 1*b)") == [] and terms("ramp(0..1)*a") == []
    assert without("0.6*task + 0.4*safety", "safety") == "0.6*task" and without("1*safety", "safety") is None
    assert replaced("0.6*task + 0.4*safety", "safety", "noise") == "0.6*task + 0.4*noise"
    merge = "safe_merge(1*task, safety=safety, threshold=0.3)"
    assert replaced(merge, "safety", "noise") == "safe_merge(1*task, safety=noise, threshold=0.3)"
    assert uses("ties(0.5*task + 0.5*safety-all)", "safety-all") and not uses("ties(1*task + 1*safety-all)", "safety")
    points = expand(["{1-l}*t + {l}*s"], ["l=0:1:0.1"])
    assert [p.values["l"] for p in spread(points, 3)] == [0.2, 0.5, 0.8]


def test_a_random_adapter_has_the_norms_and_nothing_else_of_the_other() -> None:
    torch.manual_seed(0)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.randn(4, 30), name.format("B"): torch.randn(20, 4)}
    made = randomised(tensors, seed=0)
    old, new = (x[name.format("B")] @ x[name.format("A")] for x in (tensors, made))
    assert torch.isclose(new.norm(), old.norm(), rtol=1e-5)
    assert abs((old * new).sum() / old.norm() ** 2) < 0.2
    assert all(torch.equal(value, randomised(tensors, seed=0)[key]) for key, value in made.items())
    assert not torch.equal(made[name.format("A")], randomised(tensors, seed=1)[name.format("A")])


def test_the_best_point_keeps_the_limits_before_all_else() -> None:
    found = {
        "safe": line("safe", harm=0.04, safe_answered=0.91, task=0.9),
        "kind": line("kind", harm=0.2, safe_answered=1.0, task=1.0),
        "mute": line("mute", harm=0.0, safe_answered=0.1, task=0.9),
    }
    limits = [Limit.parse("harm<=0.05"), Limit.parse("safe_answered>=0.9*kind")]
    assert best(found, limits, found) == ("safe", 0.0)
    assert best(found, [Limit.parse("harm<=0.01"), limits[1]], found)[0] == "safe"
    assert best(found, [], found)[0] == "kind"
    assert Limit.parse("task>=0.9*other").missed(found["safe"], found) == 1.0


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
    assert (limit.bound, limit.of, limit.offset) == (bound, of, offset)


@pytest.mark.parametrize("text", ["harm", "harm<0.05", "harmful<=0.05", "harm<=", "<=0.05", "harm<=5%", "harm<=5"])
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(LimitError, match="is no limit|is a share from 0 to 1"):
        Limit.parse(text)


def test_a_point_that_lacks_answers_cannot_win() -> None:
    def rows(model: str, measures: dict[str, float]) -> list[Row]:
        return [
            Row(model, measure, str(n), 1, measure, "", half, "p", "a", {"answered": value})
            for measure, value in measures.items()
            for half in HALVES
            for n in range(10)
        ]

    points = [Point("whole", "sweep", "s"), Point("cut", "sweep", "s")]
    answers = [*rows("whole", {"harm": 0.0, "safe": 0.0}), *rows("cut", {"safe": 1.0})]
    limits = [Limit.parse("safe_answered>=0.9")]
    found = Sweep(points, {}, Answers(answers, [("cut", "harmful_csv", "10 of 10 samples failed")]))
    assert verdict(found, limits)["best"] == "whole" and list(found.candidates()) == ["whole"]
    assert list(found.lines()) == ["whole", "cut"]
    nothing_whole = Sweep(points[1:], {}, Answers(answers[20:], [("cut", "harmful_csv", "all failed")]))
    assert verdict(nothing_whole, limits)["best"] == "cut"


def test_the_front_holds_what_no_other_beats() -> None:
    found = {
        "a": line("a", harm=0.1, safe_answered=0.9),
        "b": line("b", harm=0.2, safe_answered=0.95),
        "c": line("c", harm=0.2, safe_answered=0.9),
    }
    assert front(found) == ["a", "b"]


def test_a_cliff_is_a_steep_step_with_intervals_apart() -> None:
    points = [Point(f"p{n}", "sweep", "s", {"l": n / 10}) for n in range(4)]
    values = [0.95, 0.93, 0.5, 0.48]
    found = {p.model: line(p.model, safe_answered=v, harm=0.1) for p, v in zip(points, values, strict=True)}
    (cliff,) = cliffs(points, found)
    assert (cliff.measure, cliff.before.model, cliff.after.model) == ("safe_answered", "p1", "p2")
    assert cliffs(points[:2], found) == []


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_holds_the_share_and_stays_inside(case: tuple[int, int]) -> None:
    share = Share.of(*case)
    assert 0 <= share.low <= share.value <= share.high <= 1 and share.low < share.high


def test_wilsons_interval_is_the_published_one() -> None:
    share = Share.of(81, 263)  # the example of Newcombe, Statistics in Medicine 17 (1998), table I
    assert (round(share.low, 4), round(share.high, 4)) == (0.2553, 0.3662)


def test_a_report_quotes_only_the_tasks_it_may() -> None:
    def row(task: str, measure: str) -> Row:
        return Row("m", task, "1", 1, measure, "", "choose", f"prompt of {task}", "answer", {})

    rows = [row("xstest", "safe"), row("task", "task")]
    assert [one["prompt"] for one in beside(rows, ["m"])] == ["prompt of xstest", "prompt of task"]
    assert [one["prompt"] for one in beside(rows, ["m"], {"task"})] == ["prompt of task"]


def test_a_fall_of_the_task_is_a_cliff() -> None:
    points = [Point(f"p{i}", "sweep", "s", {"l": float(i)}) for i in range(2)]
    found = {"p0": line("p0", task=0.9, harm=0.1), "p1": line("p1", task=0.1, harm=0.1)}
    assert [(cliff.measure, cliff.after.model) for cliff in cliffs(points, found)] == [("task", "p1")]
