"""The shipped adapters: small, clean, and what their README says."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from adapters import Readout, load
from training.builtin.base import BASE_NAME
from training.gates.config import GateConfig
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
    assert adapter.weight_range == tuple(recipe.train.weight_range)
    readme = (folder / "README.md").read_text()
    assert f"python -m training run {name} --export examples/adapters/{name}" in readme
    assert recipe.data.path in readme


def test_the_shipped_gate_is_small_and_says_how_it_was_made() -> None:
    folder = SHIPPED / "risk"
    gate, report = load(folder), json.loads((folder / "gate.json").read_text())
    assert gate.gate is not None
    assert gate.base == BASE_NAME
    assert gate.gate == Readout(**report["readout"])
    assert (folder / "adapter_model.safetensors").stat().st_size <= 10**6
    assert (gate.rank, gate.dtype) == (GateConfig().rank, torch.float16)
    assert report["settings"] == json.loads(json.dumps(asdict(GateConfig())))
    readme = (folder / "README.md").read_text()
    assert report["command"] in readme
    assert report["command"] == "lora-fusion train gate --out examples/adapters/risk"
    for name in ("area", "false_alarms"):
        assert f"{report[name]['value']:.3f}" in readme
