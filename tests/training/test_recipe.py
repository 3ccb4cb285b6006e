"""Recipes: what is wrong is said with its name and the next step."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.recipe import RecipeError, load

GOOD = """
[adapter]
base = "tiny"
rank = 4
alpha = 8
targets = ["q_proj"]
[data]
source = "orders"
rows = 5
[training]
epochs = 1
learning_rate = 1
"""
RECIPES = Path(__file__).parents[2] / "training" / "recipes"


def read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    load(path)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    assert load(path).adapter.rank <= 16


def test_whole_numbers_pass_as_floats(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(GOOD, encoding="utf-8")
    assert load(path).training.learning_rate == 1.0
    assert load(path).adapter.targets == ("q_proj",)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank = 4", "rnak = 4", "unknown key 'adapter.rnak'; did you mean 'adapter.rank'"),
        ("[data]", "[dta]", "unknown key 'dta'; did you mean 'data'"),
        ("epochs = 1", "", "key 'training.epochs' is missing"),
        ("rank = 4", 'rank = "4"', "adapter.rank is '4'; expected a int"),
        ("rank = 4", "rank = true", "adapter.rank is True; expected a int"),
        ("rank = 4", "rank = 0", "adapter.rank is 0; expected 1 or more"),
        ('["q_proj"]', '"q_proj"', "adapter.targets is 'q_proj'; expected a list"),
        ('["q_proj"]', "[1]", r"adapter.targets\[0\] is 1; expected a str"),
        ('["q_proj"]', "[]", "adapter.targets is empty"),
        ("rank = 4", 'rank = 4\ndtype = "int8"', "adapter.dtype is 'int8'"),
        ('"orders"', '"csv"', "data.source is 'csv'"),
        ('"orders"', '"jsonl"', "data.path is missing"),
        ("rows = 5", "", "data.rows is missing"),
        ("epochs = 1", "epochs = 0", "must be 1 or more"),
        ("learning_rate = 1", "learning_rate = -1", "expected > 0"),
        ("epochs = 1", "epochs = 1\nweight_range = [0]", "weight_range"),
        ("[adapter]", "[adapter", "is not TOML"),
        ("[data]\n", "[data.x]\n", "unknown key 'data.x'"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(RecipeError, match=message):
        read(tmp_path, GOOD.replace(old, new, 1))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe at"):
        load(tmp_path / "none.toml")
