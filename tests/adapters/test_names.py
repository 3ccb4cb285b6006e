"""Names as people have them, in recipes: which ones, how they are quoted, and that they change no digest."""

import pytest

from adapters import Recipe, RecipeError, check_name, from_json, fusion_digest, parse
from adapters.recipes import name_text

NAMES = [  # B3: what adapters are called elsewhere
    "org/adapter",
    "org/adapter@v1",
    "7b-sql",
    "sql@2024-11-02",
    "1730995200",  # a training loop's lora_int_id
    "0.5",
    "1e5",
    "_tmp",
    "llama3:8b-sql",
    "ft:gpt-3.5-turbo:acme:sql:7p4lURel",
    "predibase/glue_stsb.v2",
    "a/b/c",
    "HuggingFaceTB/SmolLM2-135M-Instruct-lora-r16-alpha32-2024-11-02-final-checkpoint-2000",
    "x" * 128,
]
NOBODYS = ["/a", "a/", "a//b", "..", "a/../b", "./a", "a/.b", "a b", "a\tb", "a`b", 'a"b', "a+b", "a*b", "a=b", "a,b"]
NOBODYS += [
    "a(b)",
    "{a}",
    "a%2Fb",
    "a?b",
    "a#b",
    "a\\b",
    "~mix/a",
    "@v1",
    ":8b",
    "a\x00",
    "a\u202eb",
    "a/-b",
    "x" * 129,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_quoted_in_a_recipe_and_nowhere_else(name: str) -> None:
    assert check_name(name) == name
    for mark in "`", '"':
        recipe = parse(f"slerp(0.6*{mark}{name}{mark} + 0.4*b, t=0.3, from={mark}{name}{mark})")
        assert recipe.weights == {name: 0.6, "b": 0.4}
        assert dict(recipe.options)["from"] == name
        assert parse(recipe.format()) == from_json(recipe.to_json()) == recipe
        assert f"0.6*`{name}`" in recipe.format()
    assert parse(name_text(name)) == Recipe.single(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_digest_knows_no_names(name: str) -> None:
    digest = fusion_digest(parse("safe_merge(0.6*a, safety=b, threshold=0.3)"), base="m", parents={"a": "1", "b": "2"})
    renamed = parse(f"safe_merge(0.6*`{name}`, safety=`{name[:100]}/x`, threshold=0.3)")
    assert fusion_digest(renamed, base="m", parents={name: "1", f"{name[:100]}/x": "2"}) == digest


def test_plain_names_stay_as_they_are() -> None:
    assert parse('`task` + 0.4*"safety"').format() == "0.4*safety + 1*task"
    digest = fusion_digest(parse("0.6*a + 0.4*b"), base="m", parents={"a": "11" * 32, "b": "22" * 32})
    assert digest.startswith("6ae455af6a64f516")


@pytest.mark.parametrize("name", NOBODYS)
def test_what_is_no_name_is_refused_everywhere(name: str) -> None:
    with pytest.raises(RecipeError):
        check_name(name)
    with pytest.raises(RecipeError):
        parse(f"0.6*`{name}` + 0.4*b")
    with pytest.raises(RecipeError):
        from_json({"adapters": [{"name": name}]})
    with pytest.raises(RecipeError):
        parse("a").rename({"a": name})
