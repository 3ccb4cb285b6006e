"""Recipes whose weights a gate chooses for each prompt."""

import json
import math

import pytest
from hypothesis import given, strategies as st

from adapters import METHODS, Gate, Recipe, RecipeError, UnknownAdapterError, from_json, fusion_digest, parse
from tests.adapters.recipe_strategies import recipes

TEXT = "gate(1*task + 0.8*safety, by=risk, safety in 0..0.8)"
PARENTS = {"task": "11" * 32, "safety": "22" * 32, "risk": "33" * 32}


def digest(text: str, **parents: str) -> str:
    return fusion_digest(parse(text), base="m", parents=PARENTS | parents)


def test_a_gate_is_a_parent_and_no_adapter() -> None:
    recipe = parse(TEXT)
    assert recipe.gate == Gate("risk", (("safety", (0.0, 0.8)),))
    assert recipe.adapters == ("safety", "task")
    assert recipe.parents == ("risk", "safety", "task")
    assert recipe.roles == {}
    assert not recipe.is_sum
    assert not recipe.is_constant
    assert recipe.is_linear


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (TEXT, "gate(0.8*safety + 1*task, by=risk, safety in 0..0.8)"),
        ("gate( a+b ,b in -1 .. 1, by = `g` , a in 1..1 )", "gate(1*a + 1*b, by=g, a in 1..1, b in -1..1)"),
        ("gate(1*`o/a`, `o/a` in 0..1, by=`o/g`)", "gate(`o/a`, by=`o/g`, `o/a` in 0..1)"),
        ("gate(answer(a), by=g, a in 0..1)", "gate(answer(a), by=g, a in 0..1)"),
        ("gate(by + fade(1..0, 4)*in, by=gate, by in 0..1)", "gate(1*by + fade(1..0, 4)*in, by=gate, by in 0..1)"),
    ],
)
def test_spellings_have_one_canonical_text(text: str, canonical: str) -> None:
    assert parse(text).format() == canonical
    assert from_json(json.loads(json.dumps(parse(text).to_json()))) == parse(canonical)


def test_the_json_form() -> None:
    gate = {"by": "risk", "bounds": {"safety": [0, 0.8]}}
    terms = [{"name": "task"}, {"name": "safety", "weight": 0.8}]
    assert from_json({"adapters": terms, "gate": gate}) == parse(TEXT)


def test_what_a_gate_may_choose_has_no_more_phases_than_a_recipe_may_have() -> None:
    mix = "0*a + steps(1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7)*b"
    assert len(parse(f"answer({mix})").phases()) == 8
    for text in (f"gate({mix}, by=g, a in 0..1)", f"gate(answer({mix}), by=g, a in 0..0)"):
        recipe = parse(text)
        assert len(recipe.choose({"a": 1}).phases()) == 8
    wide = f"gate(answer({mix}), by=g, a in 0..1)"
    with pytest.raises(RecipeError, match="9 phases") as caught:
        parse(wide)
    assert caught.value.position == len(wide) - 1
    gate = {"by": "g", "bounds": {"a": [-1, 0]}}
    with pytest.raises(RecipeError, match="9 phases"):
        from_json({**parse(f"answer({mix})").to_json(), "gate": gate})


def test_bounds_are_named_as_they_are() -> None:
    with pytest.raises(RecipeError, match=r"'a in 0.1234568..0.1234569' does not contain 0.1234567, the weight"):
        parse("gate(0.1234567*a, by=g, a in 0.1234568..0.1234569)")


def test_a_gate_chooses_inside_its_bounds_and_leaves_the_rest() -> None:
    recipe = parse("gate(answer(1*task + 0.5*safety), by=risk, safety in 0..0.8)")
    assert recipe.choose({}).format() == "answer(0.5*safety + 1*task)"
    assert recipe.choose({"safety": 0.25}).format() == "answer(0.25*safety + 1*task)"
    assert recipe.choose({"safety": 7}).weights["safety"] == 0.8
    assert recipe.choose({"safety": -math.inf}).weights["safety"] == 0.0
    for wrong, says in (({"task": 1.0}, "no bounds for 'task'"), ({"safety": math.nan}, "not a number")):
        with pytest.raises(RecipeError, match=says):
            recipe.choose(wrong)
    with pytest.raises(ValueError, match="choose its weights first"):
        recipe.phases()


@given(recipes(gated=True), st.data())
def test_whatever_a_gate_chooses_is_a_valid_recipe(recipe: Recipe, data: st.DataObject) -> None:
    assert recipe.gate is not None
    bounds = dict(recipe.gate.bounds)
    chosen = recipe.choose({name: data.draw(st.floats(allow_nan=False)) for name in bounds})
    assert chosen.gate is None
    assert parse(chosen.format()) == chosen
    for name, weight in chosen.weights.items():
        if name in bounds:
            assert isinstance(weight, float)
            assert bounds[name][0] <= weight <= bounds[name][1]
        else:
            assert weight == recipe.weights[name]
    assert all(phase.adapters == recipe.adapters for _, phase in chosen.phases())


@pytest.mark.parametrize(
    ("text", "position", "says"),
    [
        ("gate(1*a, by=g, a in 0.8..0)", 16, "the wrong way round"),
        ("gate(1*a, by=g, a in 0..0.8)", 16, "does not contain 1, the weight when the gate fails"),
        ("gate(1*a, by=g, a in 0..17)", 16, "|weight| <= 16"),
        ("gate(1*task, by=g, tsk in 0..1)", 19, "did you mean 'task'"),
        ("gate(1*a, by=g, x in 0..1)", 16, "the terms are a"),
        ("gate(1*a, by=g, a in 0..1, a in 0..2)", 27, "bounds twice"),
        ("gate(ramp(0..1)*a, by=g, a in 0..1)", 25, "the weight of 'a' is a function"),
        ("gate(1*a, by=a, a in 0..1)", 13, "'a' is a term already"),
        ("gate(1*a, by=ties, a in 0..1)", 13, "reserved"),
        ("gate(1*a, by=g, by=h, a in 0..1)", 16, "expected one 'by=NAME'"),
        ("gate(1*a, density=1)", 10, "no option 'density'"),
        ("gate(1*a, a in 0..1)", 19, "a gate needs 'by=NAME'"),
        ("gate(1*a, by=g)", 14, "nothing to choose"),
        ("gate(1*a)", 8, "a gate needs"),
        ("gate(1*a, by=g, a is 0..1)", 16, "'ADAPTER in LOW..HIGH'"),
        ("gate(1*a, by=g, a 0..1)", 16, "'ADAPTER in LOW..HIGH'"),
        ("gate(1*a, by=g, a in 0, 1)", 22, "expected '..', as in 'safety in 0..0.8'"),
        ("gate(1*a, by=g, a in 0..1", 25, "expected '+', ',' or ')'"),
        ("gate(gate(1*a, by=g, a in 0..1), by=g, a in 0..1)", 5, "'gate' is called inside a gate"),
        ("answer(gate(1*a, by=g, a in 0..1))", 7, "'gate' is called inside answer(…)"),
        ("gate(answer(gate(1*a)))", 12, "'gate' is called inside a gate"),
        ("gate(svd(1*a, rank=1), by=g, a in 0..1)", 5, "a gate's recipe is a sum"),
        ("gate(answer(slerp(a + b, t=1, from=a)), by=g, a in 0..1)", 12, "a gate's recipe is a sum"),
        ("1*b + gate(1*a, by=g, a in 0..1)", 6, "around a whole recipe"),
    ],
)
def test_what_is_refused_and_where(text: str, position: int, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert caught.value.position == position, caught.value
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "gate",
    [
        None,
        "risk",
        {},
        {"by": "g"},
        {"by": 1, "bounds": {"a": [0, 1]}},
        {"by": "g", "bounds": []},
        {"by": "g", "bounds": {}},
        {"by": "g", "bounds": {"a": 1}},
        {"by": "g", "bounds": {"a": [0, 1, 2]}},
        {"by": "g", "bounds": {"a": ["0", 1]}},
        {"by": "g", "bounds": {"a": [1, 0]}},
        {"by": "g", "bounds": {"a": [math.nan, 1]}},
        {"by": "g", "bounds": {"a": [0, 10**400]}},
        {"by": "g", "bounds": {"b": [0, 1]}},
        {"by": "g", "bounds": {1: [0, 1]}},
        {"by": "a", "bounds": {"a": [0, 1]}},
        {"by": "no name", "bounds": {"a": [0, 1]}},
        {"by": "g", "bounds": {"a": [0, 1]}, "default": 1},
    ],
)
def test_json_gates_that_are_refused(gate: object) -> None:
    with pytest.raises(RecipeError) as caught:
        from_json({"adapters": [{"name": "a"}], "gate": gate})
    assert len(str(caught.value)) < 400


def test_a_gate_in_json_is_around_a_sum() -> None:
    gate = {"by": "g", "bounds": {"a": [0, 1]}}
    with pytest.raises(RecipeError, match="a gate's recipe is a sum"):
        from_json({"adapters": [{"name": "a"}], "method": "svd", "rank": 1, "gate": gate})


def test_no_method_has_an_option_of_the_json_form_s_own_names() -> None:
    assert not {"adapters", "method", "answer", "gate"} & {name for row in METHODS.values() for name in row.kinds}


def test_the_digest_covers_gate_bounds_and_what_is_around() -> None:
    texts = [
        "1*task + 0.8*safety",
        "answer(1*task + 0.8*safety)",
        TEXT,
        "gate(1*task + 0.8*safety, by=risk, safety in 0..0.9)",
        "gate(1*task + 0.8*safety, by=risk, task in 0..1)",
        "gate(answer(1*task + 0.8*safety), by=risk, safety in 0..0.8)",
        "1*task + fade(1..0.8, 8)*safety",
        "1*task + steps(prompt: 0.8, 4: 0)*safety",
        "1*task + [0.8, 0.8]*safety",
    ]
    digests = {digest(text) for text in texts}
    assert len(digests) == len(texts)
    assert digest(TEXT, risk="44" * 32) not in digests
    renamed = parse(TEXT).rename({"risk": "other", "task": "t"})
    parents = {"other": PARENTS["risk"], "t": PARENTS["task"], "safety": PARENTS["safety"]}
    assert fusion_digest(renamed, base="m", parents=parents) == digest(TEXT)
    with pytest.raises(UnknownAdapterError, match="'risk'"):
        fusion_digest(parse(TEXT), base="m", parents={"task": "11" * 32, "safety": "22" * 32})


def test_the_digest_tells_which_of_two_equal_adapters_has_bounds() -> None:
    twins = {"task": "11" * 32, "safety": "11" * 32}
    texts = [f"gate(1*task + 0.8*safety, by=risk, {name} in 0..1)" for name in ("task", "safety")]
    assert len({digest(text, **twins) for text in texts}) == 2
