"""Texts and objects made to be slow: all of them are answered at once."""

import time

import pytest

from adapters import RecipeError, from_json, parse
from adapters.recipes.grammar import MAX_TEXT

SECONDS = 2.0
MANY = ", ".join(f"x{i}: steps(" + ", ".join(f"{j}: 1" for j in range(i, i + 8)) + ")" for i in range(64))
TEXTS = {
    "nested steps": "steps(0: " * MAX_TEXT,
    "nested gates": "gate(" * MAX_TEXT,
    "nested answers": "answer(" * MAX_TEXT,
    "brackets": "[" * MAX_TEXT,
    "components": "[" + "1," * MAX_TEXT,
    "blanks": "steps(" + " " * (MAX_TEXT - 6),
    "blanks between": "gate(a" + " " * (MAX_TEXT - 20) + ", by=g",
    "dots": "fade(1" + "." * MAX_TEXT,
    "digits": "steps(" + "9" * (MAX_TEXT - 6),
    "signs": "fade(" + "-" * MAX_TEXT,
    "a long name": "gate(a, by=" + "g" * (MAX_TEXT - 20),
    "megabyte": "steps(prompt: 0, 0: 1)*a + " * 40_000,
    "many phases": f"{{{MANY}}}*a"[:MAX_TEXT],
    "many changes": " + ".join(f"steps({i}: 1, {i + 100}: 2, {i + 200}: 3)*a{i}" for i in range(64)),
    "bounds": "gate(1*a, by=g" + ", b in 0..1" * 700 + ")",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_is_refused_at_once(text: str) -> None:
    for cut in (text, text[:MAX_TEXT]):
        began = time.perf_counter()
        with pytest.raises(RecipeError) as caught:
            parse(cut)
        assert time.perf_counter() - began < SECONDS
        assert len(str(caught.value)) < 500


def one(weight: object) -> dict[str, object]:
    return {"adapters": [{"name": "a", "weight": weight}]}


OBJECTS: dict[str, dict[str, object]] = {
    "steps": one({"steps": [[i, 1] for i in range(200_000)]}),
    "the same step": one({"steps": [["prompt", 1]] * 200_000}),
    "components": one({"components": [1] * 200_000}),
    "patterns": one({f"x{i}": {"fade": [1, 0, 8]} for i in range(50_000)}),
    "bounds": {**one(1), "gate": {"by": "g", "bounds": {f"x{i}": [0, 1] for i in range(50_000)}}},
    "adapters": {"adapters": [{"name": f"a{i}", "weight": {"steps": [[i, 1]]}} for i in range(50_000)]},
    "a long canonical form": one({"components": [0.123456789012345] * 2000}),
    "numbers": one({"fade": [10**5000, -(10**5000), 10**5000]}),
    "all terms change elsewhere": {
        "adapters": [
            {"name": f"a{i}", "weight": {f"x{j}": {"steps": [[8 * i + j, 1]]} for j in range(64)}} for i in range(64)
        ]
    },
}


@pytest.mark.parametrize("content", OBJECTS.values(), ids=OBJECTS)
def test_an_object_is_refused_at_once(content: dict[str, object]) -> None:
    began = time.perf_counter()
    with pytest.raises(RecipeError) as caught:
        from_json(content)
    assert time.perf_counter() - began < SECONDS
    assert len(str(caught.value)) < 500


def test_the_largest_valid_recipe_is_read_at_once() -> None:
    text = " + ".join(f"{{x.*: fade(1..0, 8), y.*: steps(prompt: 1, 0: 1, 7: 0.5), *: 0.{i}}}*a{i}" for i in range(64))
    began = time.perf_counter()
    recipe = parse(text)
    assert len(recipe.phases()) == 8
    assert parse(recipe.format()) == recipe
    assert time.perf_counter() - began < SECONDS
