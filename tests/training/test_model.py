"""The model that is trained: which bases and targets are refused."""

import json
import shutil
from pathlib import Path

import pytest

from training import run
from training.errors import ConfigError
from training.loop.model import adapter_parameters, load_model
from training.recipe import load_recipe


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logits_scaling": 8}, "has logits_scaling"),
        ({"sliding_window": 8, "model_type": "mistral"}, "attention window is 8 tokens"),
    ],
)
def test_a_base_with_unsupported_computation_is_refused(
    orders_recipe: Path, tiny_base: Path, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    other = shutil.copytree(tiny_base, tmp_path / "other")
    content = json.loads((other / "config.json").read_text())
    content.pop("architectures")
    (other / "config.json").write_text(json.dumps(content | change))
    config, _ = load_recipe(orders_recipe, [f"model.base={other}"])
    with pytest.raises(ConfigError, match=words):
        run.start(config, tmp_path / "run", "")


def test_targets_that_match_nothing_name_the_layers(orders_recipe: Path, tiny_base: Path) -> None:
    config, _ = load_recipe(orders_recipe, ["lora.targets=['query']"])
    with pytest.raises(ConfigError, match="match no layer of the base: its linear layers are .*'q_proj'"):
        load_model(config, str(tiny_base))
    every, _ = load_recipe(orders_recipe, ["lora.targets=['all-linear']"])
    assert len(adapter_parameters(load_model(every, str(tiny_base)))) == 2 * 7 * 2
