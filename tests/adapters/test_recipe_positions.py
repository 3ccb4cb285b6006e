"""Weights by position and component: how a recipe falls into phases, and what is refused."""

import itertools
import math

import pytest
from hypothesis import given, strategies as st

from adapters import MAX_PHASES, PROMPT, Components, Recipe, RecipeError, from_json, fusion_digest, parse
from adapters.recipes.weights import Fade, Ramp, Steps, Weight, freeze, list_numbers, list_parts
from tests.adapters.recipe_strategies import recipes


def show(recipe: Recipe) -> dict[int, str]:
    return {start: phase.format() for start, phase in recipe.phases()}


@pytest.mark.parametrize(
    ("text", "phases"),
    [
        ("0.5*a + ramp(0..1)*b", {PROMPT: "0.5*a + ramp(0..1)*b"}),
        ("steps(prompt: 0.4, 0: 1, 4: 0.2)*a", {PROMPT: "0.4*a", 0: "a", 4: "0.2*a"}),
        ("steps(0: 1)*a", {PROMPT: "0*a", 0: "a"}),
        ("steps(3: 1)*a + 1*b", {PROMPT: "0*a + 1*b", 3: "1*a + 1*b"}),
        ("steps(prompt: 1, 0: 1, 2: 1)*a", {PROMPT: "a"}),
        ("steps(prompt: 0, 0: ramp(0..1))*a", {PROMPT: "0*a", 0: "ramp(0..1)*a"}),
        ("fade(1..0.5, 2)*a", {PROMPT: "a", 1: "0.5*a"}),
        ("fade(1..0, 3)*a", {PROMPT: "a", 1: "0.5*a", 2: "0*a"}),
        ("fade(1..1, 8)*a", {PROMPT: "a"}),
        ("answer(a)", {PROMPT: "0*a", 0: "a"}),
        ("answer(0*a)", {PROMPT: "0*a"}),
        ("answer(fade(1..0, 2)*a)", {PROMPT: "0*a", 0: "a", 1: "0*a"}),
        ("answer(steps(2: 1)*a + 1*b)", {PROMPT: "0*a + 0*b", 0: "0*a + 1*b", 2: "1*a + 1*b"}),
        ("answer([1, 2]*a)", {PROMPT: "0*a", 0: "[1, 2]*a"}),
        (
            "answer(slerp(a + b, t=1, from=a))",
            {PROMPT: "slerp(0*a + 0*b, from=a, t=1)", 0: "slerp(1*a + 1*b, from=a, t=1)"},
        ),
        ("{x.*: steps(0: 1), *: 0.5}*a", {PROMPT: "{x.*: 0, *: 0.5}*a", 0: "{x.*: 1, *: 0.5}*a"}),
        (
            "steps(prompt: 1, 2: 0)*a + {x: fade(1..0, 2), *: 1}*b",
            {PROMPT: "1*a + 1*b", 1: "1*a + {x: 0, *: 1}*b", 2: "0*a + {x: 0, *: 1}*b"},
        ),
    ],
)
def test_a_recipe_falls_into_phases(text: str, phases: dict[int, str]) -> None:
    assert show(parse(text)) == phases


def test_a_fade_is_a_straight_line_over_the_first_tokens() -> None:
    phases = parse("fade(1.0..0.2, 8)*a").phases()
    assert [start for start, _ in phases] == [PROMPT, *range(1, 8)]
    assert [phase.weights["a"] for _, phase in phases] == pytest.approx([1 - 0.8 * n / 7 for n in range(8)])


@given(st.integers(2, 1_000_000), st.booleans())
def test_a_fade_over_any_number_of_tokens_fits_and_keeps_both_ends(tokens: int, answer: bool) -> None:
    recipe = Recipe("sum", parse(f"fade(1..0.25, {tokens})*a").terms, answer=answer)
    phases = recipe.phases()
    assert len(phases) == min(MAX_PHASES, tokens + answer)
    weights = [weight for _, phase in phases[answer:] for weight in list_numbers(phase.weights["a"])]
    assert (weights[0], weights[-1]) == (1.0, 0.25)
    assert weights == sorted(weights, reverse=True)
    assert phases[-1][0] < tokens


@pytest.mark.parametrize(
    ("text", "simple"),
    [
        ("steps(prompt: 0.5, 0: 0.5)*a", "0.5*a"),
        ("steps(prompt: 0.5, 0: 0.5, 4: 0.2)*a", "steps(prompt: 0.5, 4: 0.2)*a"),
        ("steps(prompt: 0, 4: 0.2)*a", "steps(4: 0.2)*a"),
        ("steps(0: 0)*a", "0*a"),
        ("fade(0.5..0.5, 8)*a", "0.5*a"),
        ("answer(steps(0: 0.5)*a)", "answer(0.5*a)"),
        ("{*: 0.5}*a", "0.5*a"),
        ("{*: 0.5, *.mlp.*: 0.1}*a", "0.5*a"),
        ("{*.attn.*: 0.1, *.mlp.*: steps(prompt: 0.5, 0: 0.5), *: 0.5}*a", "{*.attn.*: 0.1, *: 0.5}*a"),
        ("{*: steps(prompt: 0.5, 4: 0.2)}*a", "steps(prompt: 0.5, 4: 0.2)*a"),
    ],
)
def test_equal_functions_have_one_text_and_one_digest(text: str, simple: str) -> None:
    assert parse(text).format() == simple
    digests = {fusion_digest(parse(recipe), base="b", parents={"a": "0" * 64}) for recipe in (text, simple)}
    assert len(digests) == 1


@pytest.mark.parametrize("text", ["steps(0: 0.5)*a", "{*.mlp.*: 0.5}*a", "{*.k.*: 0.5, *.mlp.*: 0.1, *: 0.5}*a"])
def test_what_is_not_constant_stays_a_function(text: str) -> None:
    assert parse(text).format() == text


def value_at(weight: Weight, token: int, *, answer: bool) -> Weight:
    """Written plainly: what a weight is at one token."""
    match weight:
        case Steps(rules):
            found: Weight = 0.0
            for start, level in rules:
                found = level if start <= token else found
            return found
        case Fade():
            return freeze(weight, token, MAX_PHASES - answer)
    return weight


@given(recipes(), st.integers(PROMPT, 50))
def test_every_phase_holds_up_to_the_next(recipe: Recipe, token: int) -> None:
    recipe = recipe.choose({})
    phases = recipe.phases()
    starts = [start for start, _ in phases]
    assert starts == sorted(set(starts))
    assert starts[0] == PROMPT
    assert len(phases) <= MAX_PHASES
    for (_, one), (_, two) in itertools.pairwise(phases):
        assert one != two
    (phase,) = [phase for start, phase in phases if start <= token][-1:]
    assert (phase.adapters, phase.method, phase.options) == (recipe.adapters, recipe.method, recipe.options)
    assert phase.phases() == ((PROMPT, phase),)
    for name, weight in recipe.weights.items():
        wanted = [value_at(part, token, answer=recipe.answer) for part in list_parts(weight)]
        if recipe.answer and token == PROMPT:
            assert phase.weights[name] == 0.0
        else:
            assert list(list_parts(phase.weights[name])) == wanted


@given(recipes())
def test_a_recipe_is_constant_when_it_has_one_phase_and_no_gate(recipe: Recipe) -> None:
    assert recipe.is_constant == (recipe.gate is None and len(recipe.phases()) == 1)
    assert recipe.is_constant >= recipe.is_sum


NINE = ", ".join(f"{n}: {n % 2}" for n in range(9))


@pytest.mark.parametrize(
    ("text", "position", "says"),
    [
        ("steps(0: 1, prompt: 2)*a", 12, "'prompt' comes after token 0"),
        ("1*b + steps(prompt: 1, 4: 1, 2: 1)*a", 29, "token 2 comes after token 4"),
        ("steps(prompt: 1, prompt: 2)*a", 17, "'prompt' appears twice"),
        ("steps(0: 1, 0: 2)*a", 12, "token 0 appears twice"),
        ("steps(-1: 1)*a", 6, "no phase begins at token -1"),
        ("steps(1000001: 1)*a", 6, "to 1000000"),
        ("steps(1.5: 1)*a", 6, "expected 'prompt' or the number of an answer's token"),
        ("steps(answer: 1)*a", 6, "expected 'prompt'"),
        ("steps(0.4, 1)*a", 6, "expected 'prompt'"),
        ("steps()*a", 6, "expected 'prompt'"),
        ("steps(0: 1, )*a", 12, "expected 'prompt'"),
        ("steps(0: 1", 10, "expected ',' or ')'"),
        ("steps(0 1)*a", 8, "expected ':'"),
        ("steps(0: 1)a", 11, "expected '*'"),
        ("steps(0: 17)*a", 0, "|weight| <= 16"),
        ("steps(0: 1, 3: ramp(0..17))*a", 0, "|weight| <= 16"),
        ("1*b + fade(17..0, 4)*a", 6, "|weight| <= 16"),
        ("1*b + {x: fade(0..17, 4), *: 0}*a", 6, "|weight| <= 16"),
        ("1*b + [1, 2, 16.5]*a", 6, "|weight| <= 16"),
        ("steps(0: steps(1: 1))*a", 9, "'steps' is called inside a weight"),
        ("steps(0: fade(1..0, 2))*a", 9, "'fade' is called inside a weight"),
        ("steps(0: {x: 1})*a", 9, "expected a number"),
        ("{x: svd(a)}*a", 4, "'svd' is called inside a weight"),
        (f"steps({NINE})*a", 54, "at most 8 weights"),
        ("fade(1..0)*a", 9, "a number of tokens"),
        ("fade(1, 0, 8)*a", 6, "expected '..'"),
        ("fade(1..0, 1)*a", 11, "2 to 1000000 tokens"),
        ("fade(1..0, -8)*a", 11, "2 to 1000000 tokens"),
        ("fade(1..0, 2.5)*a", 11, "whole number of tokens"),
        ("fade(1..0, 8)*a + steps(0: 1)*b", 18, "9 phases"),
        ("1*c + fade(1..0, 8)*a + {x: fade(1..0, 20), *: 1}*b", 24, "expected at most 8"),
        ("[]*a", 1, "expected a number"),
        ("[1 2]*a", 3, "expected ',' or ']'"),
        ("[1]", 3, "expected '*'"),
        ("ties(1*b + steps(0: 1)*a)", 11, "instead of 'ties'"),
        ("svd([1, 2]*a, rank=1)", 4, "instead of 'svd'"),
        ("peft_linear({x: fade(1..0, 2), *: 1}*a)", 12, "instead of 'peft_linear'"),
        ("answer(ties(a))", 7, "answer(…) around 'ties'"),
        ("answer(a) + b", 10, "expected the end of the recipe after ')', found '+' (at"),
        ("0.5*fade(1..0, 8)*a", 4, "a term has one weight: multiply the number into fade(…)"),
        ("fad(1..0, 8)*a", 0, "did you mean 'fade'?"),
        ("fade(x..0, 8)*a", 5, "expected a number, found 'x' (at"),
        ("answer(1*b + steps(prompt: 0, 0: 1)*a)", 13, "begin at 0"),
        ("answer({x: steps(prompt: 0, 0: 1), *: 1}*a)", 7, "begin at 0"),
        ("answer(answer(a))", 7, "'answer' is called inside answer(…)"),
        ("answer(a", 8, "expected '+' or ')'"),
        ("answer()", 7, "expected a name"),
        ("answer(a) + b", 10, "end of the recipe"),
        ("1*b + answer(a)", 6, "around a whole recipe"),
        ("0.5*answer(a)", 4, "around a whole recipe"),
        ("svd(answer(a), rank=1)", 4, "around a whole recipe"),
        ("anwser(a)", 0, "did you mean 'answer'"),
        ("step(0: 1)*a", 0, "unknown method"),
    ],
)
def test_what_is_refused_and_where(text: str, position: int, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert caught.value.position == position, caught.value
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "weight",
    [
        {"steps": []},
        {"steps": [["prompt"]]},
        {"steps": [["answer", 1]]},
        {"steps": [[0, 1], ["prompt", 1]]},
        {"steps": [[0, 1], [0, 1]]},
        {"steps": [[-1, 1]]},
        {"steps": [[1.0, 1]]},
        {"steps": [[True, 1]]},
        {"steps": [[10**30, 1]]},
        {"steps": [[0, 17]]},
        {"steps": [[0, math.nan]]},
        {"steps": [[0, {"steps": [[0, 1]]}]]},
        {"steps": [[0, {"*": 1}]]},
        {"steps": [[n, n / 10] for n in range(9)]},
        {"steps": [[0, 1]], "*": 1},
        {"fade": [1, 0]},
        {"fade": [1, 0, 1]},
        {"fade": [1, 0, 8.0]},
        {"fade": [1, "0", 8]},
        {"fade": [1, 17, 8]},
        {"components": []},
        {"components": ["1"]},
        {"components": [17]},
        {"components": [0] * 2049},
        {"components": [1], "*": 1},
        {"*": {"components": [1]}},
        {"*": {"*": 1}},
        {"*": [1]},
    ],
)
def test_json_weights_that_are_refused(weight: object) -> None:
    with pytest.raises(RecipeError) as caught:
        from_json({"adapters": [{"name": "a", "weight": weight}]})
    assert len(str(caught.value)) < 400


def test_the_json_form_of_each_function() -> None:
    forms: dict[str, object] = {
        "steps(prompt: 0.4, 0: ramp(0..1))*a": {"steps": [["prompt", 0.4], [0, {"ramp": [0, 1]}]]},
        "fade(1..0.2, 8)*a": {"fade": [1, 0.2, 8]},
        "[1, 0.5]*a": {"components": [1, 0.5]},
        "{steps: 1, *: fade(1..0, 2)}*a": {"steps": 1, "*": {"fade": [1, 0, 2]}},
    }
    for text, weight in forms.items():
        assert from_json({"adapters": [{"name": "a", "weight": weight}]}) == parse(text)
    answered = {"adapters": [{"name": "a"}], "answer": True}
    assert from_json(answered) == parse("answer(a)")
    assert from_json({**answered, "answer": False}) == parse("a")
    for wrong in ({"answer": 1}, {"method": "ties"}, {"method": "svd", "rank": 1}):
        with pytest.raises(RecipeError, match="answer"):
            from_json(answered | wrong)


def test_functions_have_the_names_of_no_reserved_word() -> None:
    """They came later: whoever has an adapter of such a name keeps it."""
    for name in ("steps", "fade", "answer", "gate", "prompt", "by", "in"):
        assert parse(f"0.5*{name} + steps(prompt: 1, 0: 0)*b").adapters == tuple(sorted((name, "b")))
        assert parse(f"answer({name})").adapters == (name,)


def test_components_are_counted_where_the_ranks_are_known() -> None:
    recipe = parse("[1, 0.5]*a + 1*b")
    assert recipe.weights["a"] == Components((1.0, 0.5))
    recipe.check_ranks({"a": 2, "b": 7})
    with pytest.raises(RecipeError, match="'a' has 2 weights by component, but rank 3"):
        recipe.check_ranks({"a": 3, "b": 7})


def test_a_step_may_be_a_ramp() -> None:
    assert parse("steps(0: ramp(-1..1))*a").weights["a"] == Steps(((0, Ramp(-1, 1)),))
