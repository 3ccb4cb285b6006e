"""The recipe language: one canonical text, and a position for whatever is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters import (
    METHODS,
    NAME_PATTERN,
    RESERVED_METHODS,
    RESERVED_NAMES,
    Recipe,
    RecipeError,
    Term,
    UnknownAdapterError,
    check_name,
    from_json,
    fusion_digest,
    parse,
)
from adapters.recipes.weights import ByModule, Ramp
from tests.adapters import samples  # noqa: F401  (loads the hypothesis profile)

free_names = st.from_regex(NAME_PATTERN, fullmatch=True).filter(lambda name: name not in RESERVED_NAMES)
free_weights = st.floats(-16, 16, allow_nan=False)
patterns = st.from_regex(r"[A-Za-z0-9_.*?-]{1,20}", fullmatch=True)
schedules = st.builds(Ramp, free_weights, free_weights) | st.dictionaries(
    patterns, free_weights, min_size=1, max_size=4
).map(lambda rules: ByModule(tuple(rules.items())))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    method = METHODS[draw(st.sampled_from(list(METHODS)))]
    least, most = method.terms
    weights = draw(st.dictionaries(free_names, free_weights | schedules, min_size=least, max_size=min(6, most)))
    terms = tuple(Term(name, weight) for name, weight in weights.items())
    options: dict[str, int | float | str] = {}
    for option in method.options:
        match option.kind:
            case "int":
                options[option.name] = draw(st.integers(int(option.minimum), int(option.maximum)))
            case "float":
                options[option.name] = draw(st.floats(option.minimum, option.maximum))
            case "choice":
                options[option.name] = draw(st.sampled_from(option.choices))
            case "term":
                options[option.name] = draw(st.sampled_from(sorted(weights)))
            case "adapter":
                options[option.name] = draw(free_names.filter(lambda name: name not in weights))
    return Recipe(method.name, terms, tuple(options.items()))


@given(recipes())
def test_what_is_printed_reads_back_as_the_same_recipe(recipe: Recipe) -> None:
    assert parse(recipe.format()) == recipe
    assert parse(recipe.format()).format() == str(recipe)


@given(recipes())
def test_the_json_form_reads_back_as_the_same_recipe(recipe: Recipe) -> None:
    assert from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@given(recipes(), st.randoms())
def test_the_order_of_terms_does_not_matter(recipe: Recipe, random: object) -> None:
    shuffled = list(recipe.terms)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis' own Random
    assert dataclasses.replace(recipe, terms=tuple(shuffled)) == recipe
    assert hash(dataclasses.replace(recipe, terms=tuple(shuffled))) == hash(recipe)


@given(st.text(max_size=40) | st.text(alphabet="ab01.eE+-*(),= svdrnk", max_size=40))
def test_any_text_is_a_recipe_or_an_error_within_the_text(text: str) -> None:
    try:
        recipe = parse(text)
    except RecipeError as error:
        assert error.position is not None and 0 <= error.position <= len(text)
        assert f"position {error.position}" in str(error)
    else:
        assert parse(recipe.format()) == recipe
        assert all(math.isfinite(term.weight) for term in recipe.terms)


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
        ("a@3", 1, "found '@'"),
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


@pytest.mark.parametrize(
    "obj",
    [
        None,
        [],
        "task",
        {},
        {"adapters": []},
        {"adapters": "task"},
        {"adapters": ["task"]},
        {"adapters": [{"weight": 1}]},
        {"adapters": [{"name": 1}]},
        {"adapters": [{"name": "a", "weight": True}]},
        {"adapters": [{"name": "a", "weight": "1"}]},
        {"adapters": [{"name": "a", "weight": None}]},
        {"adapters": [{"name": "a", "weight": math.nan}]},
        {"adapters": [{"name": "a", "weight": math.inf}]},
        {"adapters": [{"name": "a", "weight": 10**400}]},
        {"adapters": [{"name": "a", "weight": 16.01}]},
        {"adapters": [{"name": "a", "wieght": 1}]},
        {"adapters": [{"name": "a"}, {"name": "a"}]},
        {"adapters": [{"name": "ties"}]},
        {"adapters": [{"name": "a b"}]},
        {"adapters": [{"name": "a\n"}]},
        {"adapters": [{"name": "a"}], "method": None},
        {"adapters": [{"name": "a"}], "method": ["svd"]},
        {"adapters": [{"name": "a"}], "method": "tie"},
        {"adapters": [{"name": "a", "weight": {}}]},
        {"adapters": [{"name": "a", "weight": {"ramp": [1]}}]},
        {"adapters": [{"name": "a", "weight": {"ramp": [1, 99]}}]},
        {"adapters": [{"name": "a", "weight": {"no spaces": 1}}]},
        {"adapters": [{"name": "a", "weight": {"*": "1"}}]},
        {"adapters": [{"name": "a"}], "method": "slerp", "t": 0.5, "from": "a"},
        {"adapters": [{"name": "a"}], "method": "safe_merge", "safety": "a", "threshold": 0.3},
        {"adapters": [{"name": "a"}], "method": "ties", "majority": "most"},
        {"adapters": [{"name": "a"}], "method": "svd"},
        {"adapters": [{"name": "a"}], "method": "svd", "rank": True},
        {"adapters": [{"name": "a"}], "method": "svd", "rank": "8"},
        {"adapters": [{"name": "a"}], "rank": 8},
        {"adapters": [{"name": "a"}], "strict": True},
    ],
)
def test_json_forms_that_are_refused(obj: object) -> None:
    with pytest.raises(RecipeError) as caught:
        from_json(obj)
    assert caught.value.position is None


def test_json_weight_defaults_to_one_and_method_to_sum() -> None:
    assert from_json({"adapters": [{"name": "b", "weight": 2}, {"name": "a"}]}) == parse("2*b + a")


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
    assert recipe.is_sum and not parse("svd(a, rank=1)").is_sum
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.method = "svd"  # type: ignore[misc]  # frozen: that is what is tested


@pytest.mark.parametrize("name", ["", "1a", "-a", "a b", "a@1", "a\n", "ä", "x" * 65, *sorted(RESERVED_NAMES)])
def test_names_that_nobody_may_have(name: str) -> None:
    with pytest.raises(RecipeError):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "task", "Llama-2.7_b", "x" * 64, "plan9", "sums"])
def test_names_that_are_fine(name: str) -> None:
    assert check_name(name) == name


def test_every_method_name_is_reserved() -> None:
    assert set(METHODS) <= set(RESERVED_METHODS) <= RESERVED_NAMES
    assert list(RESERVED_METHODS) == sorted(set(RESERVED_METHODS))


PARENTS = {"a": "11" * 32, "b": "22" * 32}


def test_the_digest_is_the_same_for_all_spellings_and_names() -> None:
    digest = fusion_digest(parse("0.6*a + 0.4*b"), base="m", parents=PARENTS)
    assert len(digest) == 64 and int(digest, 16) >= 0
    assert digest == fusion_digest(parse("sum(4e-1*b+.6*a)"), base="m", parents=PARENTS)
    renamed = {"z": PARENTS["a"], "k": PARENTS["b"]}
    assert digest == fusion_digest(parse("0.6*z + 0.4*k"), base="m", parents=renamed)


def test_the_digest_tells_different_fusions_apart() -> None:
    cases = [
        (text, base, parents)
        for text in ("0.6*a + 0.4*b", "0.4*a + 0.6*b", "0.6*a", "0.6*a + 0*b", "svd(0.6*a + 0.4*b, rank=2)")
        for base in ("m", "n")
        for parents in (PARENTS, {"a": "33" * 32, "b": "22" * 32})
    ]
    cases.append(("svd(0.6*a + 0.4*b, rank=3)", "m", PARENTS))
    twins = {"a": "33" * 32, "b": "33" * 32}  # one content under two names: from which one it goes still matters
    cases += [(f"slerp(1*a + 2*b, t=0.3, from={name})", "m", twins) for name in "ab"]
    digests = {fusion_digest(parse(text), base=base, parents=parents) for text, base, parents in cases}
    assert len(digests) == len(cases)


def test_a_new_version_of_a_method_is_a_new_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fusion_digest(parse("a"), base="m", parents=PARENTS)
    newer = {**METHODS, "sum": dataclasses.replace(METHODS["sum"], version=METHODS["sum"].version + 1)}
    monkeypatch.setattr("adapters.recipes.recipe.METHODS", newer)
    assert fusion_digest(parse("a"), base="m", parents=PARENTS) != before


def test_the_digest_needs_every_parent() -> None:
    with pytest.raises(UnknownAdapterError) as caught:
        fusion_digest(parse("taks"), base="m", parents={"task": "11" * 32})
    assert (caught.value.name, caught.value.nearest) == ("taks", "task")
