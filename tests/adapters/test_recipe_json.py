"""The JSON form of a recipe."""

import json
import math
import re

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


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        ({"steps": [[4, 1], [0, 1]]}, "'adapters[0].weight': token 0 comes after token 4"),
        ({"steps": [[-1, 1]]}, "'adapters[0].weight': no phase begins at token -1"),
        ({"fade": [1, 0, 1]}, "'adapters[0].weight': a fade goes over 2 to 1000000 tokens, got 1"),
        ({"components": [1] * 2049}, "'adapters[0].weight': a weight has at most 2048 components"),
        ({"fade": [1, 0]}, "'adapters[0].weight' must be"),
        ({"fade": [math.nan, 0, 8]}, "the weight nan of 'a' is out of range"),
    ],
)
def test_the_error_says_which_weight_is_wrong(weight: object, says: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(says)):
        from_json({"adapters": [{"name": "a", "weight": weight}]})


def test_a_key_that_is_nearly_right_is_named() -> None:
    with pytest.raises(RecipeError, match="no option 'Answer': did you mean 'answer'"):
        from_json({"adapters": [{"name": "a"}], "Answer": True})


def test_json_weight_defaults_to_one_and_method_to_sum() -> None:
    assert from_json({"adapters": [{"name": "b", "weight": 2}, {"name": "a"}]}) == parse("2*b + a")
