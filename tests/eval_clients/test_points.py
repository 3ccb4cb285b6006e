"""Points of a sweep: grids, templates, expressions."""

import math

import pytest
from hypothesis import given, strategies as st

from eval_clients.errors import TemplateError
from eval_clients.sweeps.points import Point, evaluate, expand, parse_grid


def test_a_grid_holds_both_ends_and_exact_steps() -> None:
    assert parse_grid("l=0:1:0.1")[1] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    assert parse_grid("l=1:0:-0.5") == ("l", [1, 0.5, 0])
    assert parse_grid("w = 0.3,1") == ("w", [0.3, 1])


def test_a_template_is_filled_with_short_numbers_and_repeats_nothing() -> None:
    points = expand(["{1-l}*task + {l}*safety", "1*task"], ["l=0:1:0.1"])
    assert len(points) == 12
    assert points[3].model == "0.7*task + 0.3*safety"
    assert points[3].values == {"l": 0.3}
    assert expand(["{l*2}*a", "{2*l}*a"], ["l=1,1"])[0].model == "2*a"


def test_a_recipes_own_braces_stay() -> None:
    assert expand(["{*.mlp.*: 0.2, *: 0.6}*safety + {t}*task"], ["t=1"])[0].model.startswith("{*.mlp.*: 0.2, *: 0.6}*")


@pytest.mark.parametrize(
    ("template", "grids", "model"),
    [
        (
            "1*t + steps(prompt: {l}, 0: {1-l}, {n}: {l/2})*s",
            ["l=0.4", "n=4"],
            "1*t + steps(prompt: 0.4, 0: 0.6, 4: 0.2)*s",
        ),
        ("1*t + fade({l}..{l/5}, {n})*s", ["l=1", "n=8"], "1*t + fade(1..0.2, 8)*s"),
        ("answer({1-l}*t + {l}*s)", ["l=0.4"], "answer(0.6*t + 0.4*s)"),
        ("{*.mlp.*: {l}, *: fade({l}..0, 4)}*s", ["l=0.4"], "{*.mlp.*: 0.4, *: fade(0.4..0, 4)}*s"),
        ("gate(1*t + {l}*s, by=risk, s in 0..{l})", ["l=0.8"], "gate(1*t + 0.8*s, by=risk, s in 0..0.8)"),
        ("[{l}, {1-l}]*s", ["l=0.4"], "[0.4, 0.6]*s"),
        ("ramp({-l}..{l})*s", ["l=0.4"], "ramp(-0.4..0.4)*s"),
    ],
)
def test_a_grid_fills_any_number_of_a_recipe(template: str, grids: list[str], model: str) -> None:
    (point,) = expand([template], grids)
    assert point.model == model
    assert point.recipe is not None
    assert not point.recipe.is_sum or "(" not in model


@pytest.mark.parametrize(
    ("templates", "grids", "message"),
    [
        (["{l}*a"], [], "has no grid"),
        (["1*a"], ["l=0:1:0.1"], "no recipe uses the grid variable"),
        (["{l}*a"], ["l=0:1:-0.1"], "FIRST:LAST:STEP"),
        (["{l}*a"], ["l=0:x:1"], "expected a finite number"),
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
    assert math.isclose(evaluate("1 - a*(b + 2)", {"a": a, "b": b}), 1 - a * (b + 2), abs_tol=1e-9)


def test_a_point_is_read_as_a_recipe_where_it_is_one() -> None:
    recipe = Point("ties(20*task + 0.3*safety, density=0.5)", "sweep", "").recipe
    assert recipe is not None
    assert recipe.adapters == ("safety", "task")
    assert Point("balanced@3", "sweep", "").recipe is None


@pytest.mark.parametrize(
    ("model", "form"),
    [
        ("1*a + 0.5*b", "sum"),
        ("1*a + fade(1..0.5, 8)*b", "position"),  # an end of a grid
        ("{*.mlp.*: steps(prompt: 0, 0: 1), *: 1}*a", "position"),
        ("ramp(1..1)*a", "module"),
        ("answer(fade(1..0, 8)*a)", "answer"),
        ("gate(1*a + fade(1..0, 8)*b, by=g, a in 0..1)", "gate"),
        ("ties(1*a + 1*b)", "method"),
        ("balanced@3", "other"),
    ],
)
def test_the_form_says_what_the_weights_depend_on(model: str, form: str) -> None:
    assert Point(model, "sweep", model).form == form
