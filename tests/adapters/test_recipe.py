"""The recipe language: one canonical text, and a position for whatever is refused."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, strategies as st

from adapters import METHODS, RESERVED_METHODS, RESERVED_NAMES, Recipe, RecipeError, check_name, parse
from adapters.recipes.weights import list_numbers
from tests.adapters.recipe_strategies import recipes


@given(recipes())
def test_what_is_printed_reads_back_as_the_same_recipe(recipe: Recipe) -> None:
    assert parse(recipe.format()) == recipe
    assert parse(recipe.format()).format() == str(recipe)


@given(recipes(), st.randoms())
def test_the_order_of_terms_does_not_matter(recipe: Recipe, random: object) -> None:
    shuffled = list(recipe.terms)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis' own Random
    assert dataclasses.replace(recipe, terms=tuple(shuffled)) == recipe
    assert hash(dataclasses.replace(recipe, terms=tuple(shuffled))) == hash(recipe)


@given(st.text(max_size=40) | st.text(alphabet='ab01.eE+-*(),= svdrnk`"/@:', max_size=40))
def test_any_text_is_a_recipe_or_an_error_within_the_text(text: str) -> None:
    try:
        recipe = parse(text)
    except RecipeError as error:
        refusal = error
    else:
        assert parse(recipe.format()) == recipe
        assert all(math.isfinite(number) for weight in recipe.weights.values() for number in list_numbers(weight))
        return
    assert refusal.position is not None
    assert 0 <= refusal.position <= len(text)
    assert f"position {refusal.position}" in str(refusal)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("task", "task"),
        (" 1*task ", "task"),
        ("b+a", "1*a + 1*b"),
        ("0.60*task\n+\t4e-1*safety", "0.4*safety + 0.6*task"),
        ("1e-3*task", "0.001*task"),
        ("+1*b + -0.5*a", "-0.5*a + 1*b"),
        ("-0*a", "0*a"),
        (".5*a + 5.*b", "0.5*a + 5*b"),
        ("1e-7*a", "1e-07*a"),
        ("sum(a + b)", "1*a + 1*b"),
        ("svd( a ,rank = 8 )", "svd(a, rank=8)"),
        ("1*a-b.c_d", "a-b.c_d"),
        ("2*e3 + 1e1*e-3", "10*e-3 + 2*e3"),
        ('0.60*"org/a"+`task`', "0.6*`org/a` + 1*task"),
    ],
)
def test_spellings_have_one_canonical_text(text: str, canonical: str) -> None:
    assert parse(text).format() == canonical


@pytest.mark.parametrize(
    ("text", "position", "says"),
    [
        ("", 0, "empty"),
        ("   ", 3, "empty"),
        ("a + ", 4, "expected a name, found the end"),
        ("a - 0.4*b", 2, "found '-'"),
        ("a-0.4*b", 0, "joined by '+'"),
        ("a + 1*a", 6, "twice"),
        ("17*a", 0, "16"),
        ("a + -16.5*b", 4, "16"),
        ("1e999*a", 0, "out of range"),
        ("inf*a", 0, "decimal weight"),
        ("nan*a", 0, "decimal weight"),
        ("0.5 a", 4, "expected '*'"),
        ("0x10*a", 1, "expected '*'"),
        ("1_0*a", 1, "expected '*'"),
        ("1e*a", 1, "expected '*'"),
        ("-a", 0, "digits after the sign"),
        ("- 1*a", 0, "digits after the sign"),
        ("٣*a", 0, "found '٣'"),
        ("1*ä", 2, "found 'ä'"),
        ("a\u00a0+ b", 1, "expected '+'"),
        ("a@3", 1, "found '@'; names with"),
        ("0.6*org/a", 7, "as in '0.6*`org/adapter`'"),
        ("0.6*7b-sql", 4, "found '7'; names with"),
        ("7b-sql + a", 1, "found 'b'; names with"),
        ("0.6*`org/a", 4, "expected a second `"),
        ("1*a + `svd`", 6, "reserved"),
        ("0.6*``", 4, "not a valid name"),
        ("`a`(b)", 0, "do not nest"),
        ("a b", 2, "found 'b'"),
        ("a)", 1, "found ')'"),
        ("2*" + "x" * 65, 2, "64 characters"),
        ("0.5*svd", 4, "reserved"),
        ("plan", 0, "reserved"),
        ("tie(1*a, density=0.5)", 0, "did you mean 'ties'"),
        ("ties(1*a, density=0)", 18, "1e-06 to 1"),
        ("ties(1*a, majority=most)", 19, "total, frequency"),
        ("slerp(a, t=0.5, from=a)", 22, "takes 2 adapters, got 1"),
        ("slerp(a + b, t=0.5, from=c)", 25, "one of the recipe's adapters"),
        ("slerp(a + b, t=1.5, from=a)", 15, "0 to 1"),
        ("safe_merge(a, safety=a, threshold=0.3)", 21, "is a term already"),
        ("safe_merge(a, safety=b)", 22, "needs the option 'threshold'"),
        ("ramp(0.2..0.6)safety", 14, "expected '*'"),
        ("ramp(0.2, 0.6)*safety", 8, "expected '..'"),
        ("ramp(0..99)*a", 0, "|weight| <= 16"),
        ("{*.mlp.*: 0.2, *.mlp.*: 1}*a", 15, "twice"),
        ("{*.mlp.* 0.2}*a", 9, "expected ':'"),
        ("{}*a", 1, "pattern of module names"),
        ("  nosuch(a)", 2, "unknown method 'nosuch'"),
        ("svd(svd(a, rank=2), rank=2)", 4, "do not nest"),
        ("1*a + svd(b, rank=2)", 6, "do not nest"),
        ("svd(a)", 5, "needs the option 'rank'"),
        ("svd(a, rank=0)", 12, "1 to"),
        ("svd(a, rank=2.0)", 12, "whole number"),
        ("svd(a, rank=b)", 12, "expected a number"),
        ("svd(a, rank=2, rank=3)", 15, "twice"),
        ("svd(a, size=2)", 7, "no option 'size'"),
        ("sum(a, rank=2)", 7, "its options are none"),
        ("svd(a, rank 2)", 12, "expected '='"),
        ("svd(a, rank=2", 13, "')'"),
        ("svd(a, rank=2) x", 15, "end of the recipe"),
        ("svd(, rank=2)", 4, "expected a name"),
        (" + ".join(f"a{i}" for i in range(65)), 374, "at most 64"),
        ("a" * 8193, 8192, "at most 8192"),
    ],
)
def test_what_is_refused_and_where(text: str, position: int, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert caught.value.position == position, caught.value
    assert says in str(caught.value)


def test_there_is_no_negative_zero() -> None:
    assert str(parse("-0*a").weights["a"]) == "0.0"
    assert json.dumps(parse("-0*a").to_json()) == json.dumps(parse("0*a").to_json())


def test_the_weight_bound_is_a_setting() -> None:
    assert parse("20*a", max_weight=20).weights == {"a": 20.0}
    with pytest.raises(RecipeError, match=r"<= 0\.5"):
        parse("0.6*a", max_weight=0.5)


def test_a_recipe_is_frozen_and_says_what_it_is() -> None:
    recipe = parse("0.6*task + 0.4*safety")
    assert recipe.adapters == ("safety", "task")
    assert recipe.weights == {"safety": 0.4, "task": 0.6}
    assert recipe.is_sum
    assert not parse("svd(a, rank=1)").is_sum
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.method = "svd"  # type: ignore[misc]  # frozen: that is what is tested


@pytest.mark.parametrize("name", ["", "-a", "a b", "a\n", "ä", "x" * 129, *sorted(RESERVED_NAMES)])
def test_names_that_nobody_may_have(name: str) -> None:
    with pytest.raises(RecipeError):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "task", "Llama-2.7_b", "x" * 128, "plan9", "sums"])
def test_names_that_are_fine(name: str) -> None:
    assert check_name(name) == name


def test_every_method_name_is_reserved() -> None:
    assert set(METHODS) <= set(RESERVED_METHODS) <= RESERVED_NAMES
    assert list(RESERVED_METHODS) == sorted(set(RESERVED_METHODS))
