"""Recipes: presets, overrides, and errors that name the setting and the next step."""

from pathlib import Path

import pytest

from training.config import SOURCES, from_json, to_json
from training.errors import ConfigError
from training.recipe import RECIPES, load_recipe

GOOD = """
[model]
base = "tiny"
[lora]
r = 4
alpha = 8
targets = ["q_proj"]
[data]
path = "rows.jsonl"
[train]
epochs = 1
learning_rate = 1
"""


def write_recipe(tmp_path: Path, text: str = GOOD) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    config, warnings = load_recipe(path)
    assert config.lora.r <= 16
    assert not warnings
    assert config.data.path.startswith(SOURCES) or Path(config.data.path).is_file()


def test_paths_start_at_the_recipe_and_overrides_where_the_command_runs(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, GOOD.replace('"rows.jsonl"', '"rows.jsonl"\nmix = {"more.jsonl" = 0.03}'))
    config, _ = load_recipe(path)
    assert config.data.path == str(tmp_path / "rows.jsonl")
    assert list(config.data.mix) == [str(tmp_path / "more.jsonl")]
    config, _ = load_recipe(
        path, ["data.path=my.jsonl", "lora.r=16", "lora.targets=['v_proj']", 'policy.precision="bf16"']
    )
    assert config.data.path == "my.jsonl"
    assert config.lora.r == 16
    assert config.lora.targets == ("v_proj",)
    assert config.policy.precision == "bf16"
    assert config.train.learning_rate == 1.0


def test_a_recipe_overrides_its_preset(tmp_path: Path) -> None:
    config, _ = load_recipe(write_recipe(tmp_path, 'preset = "paper"\n' + GOOD))
    assert (config.train.epochs, config.train.schedule, config.train.decay) == (1, "step", 0.85)
    assert (config.lora.r, config.lora.dropout) == (4, 0.05)
    modern, _ = load_recipe(
        write_recipe(tmp_path, 'preset = "modern"\n[model]\nbase = "tiny"\n[data]\npath = "hub:some/set"\n')
    )
    assert modern.lora.rslora
    assert modern.lora.targets == ("all-linear",)
    assert modern.data.path == "hub:some/set"


def test_a_configuration_survives_its_json_form(tmp_path: Path) -> None:
    config, _ = load_recipe(write_recipe(tmp_path), ["data.mix={'a.jsonl' = 0.1}", "train.weight_range=[0.5, 1]"])
    assert from_json(to_json(config)) == config
    assert set(to_json(config)) == {"model", "data", "lora", "train", "policy", "checkpoint", "log"}


def test_a_setting_without_effect_is_a_warning(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    assert load_recipe(path)[1] == []
    _, warnings = load_recipe(path, ["train.decay=0.5", "policy.selective_every=3", "data.split=test"])
    assert [warning.split()[0] for warning in warnings] == ["train.decay", "data.split", "policy.selective_every"]
    assert load_recipe(path, ["train.decay=0.5", "train.schedule=step"])[1] == []
    assert load_recipe(path, ["data.split=test", "data.path=rows.json"])[1] == []
    assert load_recipe(path, ["data.path=orders:3", "data.columns={prompt = 'a'}"])[1] == [
        "data.columns has no effect: built-in data have one format"
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("r = 4", "rnak = 4", "unknown key 'lora.rnak': did you mean 'lora.r"),
        ("[data]", "[dta]", "unknown key 'dta': did you mean 'data'"),
        ('path = "rows.jsonl"', "", "key 'data.path' is missing"),
        ("r = 4", 'r = "4"', "lora.r is '4': expected an integer"),
        ("r = 4", "r = true", "lora.r is True: expected an integer"),
        ("r = 4", "r = 0", "lora.r is 0: expected 1 to 512"),
        ('["q_proj"]', '"q_proj"', "lora.targets is 'q_proj': expected a list"),
        ('["q_proj"]', "[1]", r"lora.targets\[0\] is 1: expected a string"),
        ('["q_proj"]', "[]", "lora.targets is "),
        ("r = 4", 'r = 4\ndtype = "int8"', "lora.dtype is 'int8': expected one of float32"),
        ("epochs = 1", "epochs = 0", "train.epochs is 0: expected 1 or more"),
        ("learning_rate = 1", "learning_rate = -1", "more than 0"),
        ("epochs = 1", "epochs = 1\nweight_range = [0]", "train.weight_range"),
        ("[model]", "[model", "is not valid TOML"),
        ("[data]\n", "[data.x]\n", "unknown key 'data.x'"),
        ("[data]\n", "[data]\nmix = {a = 1.5}\n", "data.mix"),
        ("[data]\n", "[data]\nmix = 3\n", "expected a table"),
        ("[data]\n", "[data]\ncolumns = 3\n", 'expected a table such as {prompt = "question"}'),
        ("[data]\n", "[data]\ncolumns = {answers = 'a'}\n", "a key of data.columns is 'answers': expected one of"),
        ("[data]\n", "[data]\nweights = {No = 0}\n", "data.weights is {'No': 0.0}: expected numbers above 0"),
        ("[model]", 'preset = "old"\n[model]', "preset is 'old': expected one of paper, modern"),
    ],
)
def test_a_bad_recipe_is_refused_by_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=message):
        load_recipe(write_recipe(tmp_path, GOOD.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora.r", "expected TABLE.KEY=VALUE"),
        ("r=3", "expected TABLE.KEY=VALUE"),
        ("lora.rr=3", "unknown key 'lora.rr': did you mean 'lora.r'"),
        ("lora.r=x", "lora.r is 'x': expected an integer"),
        ("policy.precision=int8", "expected one of fp32"),
    ],
)
def test_a_bad_override_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write_recipe(tmp_path), [text])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no recipe .*: expected a TOML file or one of safety, task"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="there is no recipe 'safty': did you mean 'safety'"):
        load_recipe("safty")
