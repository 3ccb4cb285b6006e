"""Recipes with an adapter left out, or with other names."""

import pytest
from hypothesis import assume, given, strategies as st

from adapters import METHODS, Recipe, RecipeError, UnknownAdapterError, parse
from tests.adapters.recipe_strategies import free_names, recipes


@given(recipes(), st.data())
def test_a_recipe_without_an_adapter_is_valid_and_names_the_others(recipe: Recipe, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(recipe.parents))
    try:
        rest = recipe.without(name)
    except RecipeError:
        assert len(recipe.terms) == METHODS[recipe.method].terms[0]
        assert name in recipe.weights
        return
    assert parse(rest.format()) == rest
    if name not in recipe.roles.values():
        assert set(rest.adapters) == set(recipe.adapters) - {name}
        assert rest.method == recipe.method
    assert rest.weights == {other: weight for other, weight in recipe.weights.items() if other != name}
    assert rest.answer == recipe.answer
    assert name not in rest.parents


@pytest.mark.parametrize(
    ("text", "left_out", "rest"),
    [
        ("0.6*task + 0.4*safety", "safety", "0.6*task"),
        ("1*task + 0.4*safety", "safety", "task"),
        ("ties(0.6*task + 0.4*safety, density=0.3)", "safety", "ties(0.6*task, density=0.3)"),
        ("ramp(0.2..0.6)*task + {*.mlp.*: 0.4, *: 0}*safety", "safety", "ramp(0.2..0.6)*task"),
        ("ramp(0.2..0.6)*task + {*.mlp.*: 0.4, *: 0}*safety", "task", "{*.mlp.*: 0.4, *: 0}*safety"),
        ("safe_merge(0.6*a + b, safety=s, threshold=0.3)", "a", "safe_merge(b, safety=s, threshold=0.3)"),
        ("safe_merge(0.6*a + b, safety=s, threshold=0.3)", "s", "0.6*a + 1*b"),
        ("safe_project(0.6*a, direction=d)", "d", "0.6*a"),
        ("answer(0.6*a + steps(0: 1)*b)", "a", "answer(b)"),
        ("answer(safe_merge(0.6*a, safety=s, threshold=0.3))", "s", "answer(0.6*a)"),
        ("gate(answer(1*a + 0.5*b), by=g, a in 0..1, b in 0..1)", "b", "gate(answer(a), by=g, a in 0..1)"),
        ("gate(answer(1*a + 0.5*b), by=g, b in 0..1)", "b", "answer(a)"),
        ("gate(1*a + 0.5*b, by=g, b in 0..1)", "g", "1*a + 0.5*b"),
    ],
)
def test_what_remains_without_an_adapter(text: str, left_out: str, rest: str) -> None:
    assert parse(text).without(left_out).format() == rest


@pytest.mark.parametrize(
    ("text", "left_out"),
    [
        ("task", "task"),
        ("slerp(a + b, t=0.3, from=a)", "a"),
        ("slerp(a + b, t=0.3, from=a)", "b"),
        ("safe_merge(a, safety=s, threshold=0.3)", "a"),
    ],
)
def test_what_cannot_be_left_out_is_an_error(text: str, left_out: str) -> None:
    with pytest.raises(RecipeError, match=f"is not valid without {left_out!r}"):
        parse(text).without(left_out)


def test_leaving_out_an_adapter_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(UnknownAdapterError, match="did you mean 'safety'"):
        parse("task + safety").without("saftey")


@given(recipes(), st.data())
def test_renaming_there_and_back_changes_nothing(recipe: Recipe, data: st.DataObject) -> None:
    new = data.draw(st.lists(free_names, unique=True, min_size=len(recipe.parents), max_size=len(recipe.parents)))
    renamed = recipe.rename(dict(zip(recipe.parents, new, strict=True)))
    assert set(renamed.parents) == set(new)
    assert parse(renamed.format()) == renamed
    assert renamed.rename(dict(zip(new, recipe.parents, strict=True))) == recipe


@given(recipes())
def test_two_adapters_can_swap_their_names(recipe: Recipe) -> None:
    assume(len(recipe.adapters) > 1)
    one, two = recipe.adapters[:2]
    swapped = recipe.rename({one: two, two: one})
    assert swapped.adapters == recipe.adapters
    assert swapped.rename({one: two, two: one}) == recipe


@pytest.mark.parametrize(
    ("text", "renamed"),
    [
        ("0.6*task + 0.4*a", "0.4*a + 0.6*z"),
        ("slerp(task + b, t=0.3, from=task)", "slerp(1*b + 1*z, from=z, t=0.3)"),
        ("safe_merge(a, safety=task, threshold=0.3)", "safe_merge(a, safety=z, threshold=0.3)"),
        ("svd({task.*: 0.5, *: 1}*task, rank=2)", "svd({task.*: 0.5, *: 1}*z, rank=2)"),
        ("a", "a"),
        ("gate(1*task + 1*b, by=c, task in 0..1)", "gate(1*b + 1*z, by=c, z in 0..1)"),
        ("gate(1*a + 1*b, by=task, a in 0..1)", "gate(1*a + 1*b, by=z, a in 0..1)"),
        ("answer(fade(1..0, 4)*task)", "answer(fade(1..0, 4)*z)"),
    ],
)
def test_a_name_changes_wherever_the_recipe_names_the_adapter(text: str, renamed: str) -> None:
    assert parse(text).rename({"task": "z"}).format() == renamed


@pytest.mark.parametrize("new", ["b", "svd", "no spaces", ""])
def test_a_new_name_must_be_valid_and_free(new: str) -> None:
    with pytest.raises(RecipeError):
        parse("a + b").rename({"a": new})
