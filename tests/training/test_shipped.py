"""The shipped adapters: small, clean, and what their README says."""

import json
from pathlib import Path

import pytest

from adapters import load
from training.builtin.base import BASE_NAME
from training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "adapters"


@pytest.mark.parametrize("name", ["task", "safety"])
def test_a_shipped_adapter_is_whole(name: str) -> None:
    folder = SHIPPED / name
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 5 * 2**20
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE_NAME
    assert not [value for value in config.values() if isinstance(value, str) and "/" in value]
    recipe, _ = load_recipe(name)
    adapter = load(folder)  # refuses NaN and Inf
    assert adapter.rank == recipe.lora.r
    assert {module.rpartition(".")[2] for module in adapter.modules} == set(recipe.lora.targets)
    readme = (folder / "README.md").read_text()
    assert f"python -m training run {name} --export examples/adapters/{name}" in readme
    assert recipe.data.path in readme
