"""The JSON form of a recipe."""

import json
import math

import pytest
from hypothesis import given

from adapters import Recipe, RecipeError, from_json, parse
from tests.adapters.recipe_strategies import recipes


@given(recipes())
def test_the_json_form_reads_back_as_the_same_recipe(recipe: Recipe) -> None:
    assert from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


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
