"""What users of an installed package have: names without paths, from any folder, and a cheap import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from training.cli import main
from training.recipe import list_recipes, load_recipe
from training.rows.dataset import collect_chats, digest
from training.rows.readers import read_chats

DIGESTS = {"safety": "2eb4811e5ec4abf0", "task": "82ef2b5e7f579cdd"}
"""Of each shipped recipe's data, as the shipped adapters' README says."""


def run_python(code: str, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", list_recipes())
def test_a_shipped_recipe_and_its_data_are_named_without_a_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, warnings = load_recipe(name)
    assert not warnings
    assert digest(collect_chats(config.data))[:16] == DIGESTS[name]


def test_a_file_of_a_recipe_s_name_is_taken_before_the_shipped_recipe(
    orders_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(orders_recipe.parent)
    orders_recipe.rename("safety")
    assert load_recipe("safety")[0].data.path == "orders:12"


@pytest.mark.parametrize("source", ["orders:5", "safety:train", "safety:heldout"])
def test_built_in_data_are_checked_from_any_folder(
    source: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "check", source, "--base", str(tiny_base), "--max-tokens", "2000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == len(read_chats(source))


def test_a_shipped_recipe_runs_by_name(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes = ["train.max_steps=1", "data.max_tokens=2000", "data.rows=4", "lora.targets=['q_proj']"]
    sets = [word for change in changes for word in ("--set", change)]
    assert main(["run", "safety", "--base", str(tiny_base), *sets], prog="lora-fusion train") == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("safety-")
    command = json.loads((folder / "run.json").read_text())["command"]
    assert command.startswith("lora-fusion train run safety --base")


def test_importing_the_command_line_reads_no_data(tmp_path: Path) -> None:
    code = """
import builtins, io, sys

def refuse(file, *args, **options):
    assert "training" not in str(file) or str(file).endswith((".py", ".pyc", ".pyi")), file
    return open_file(file, *args, **options)

open_file = io.open
builtins.open = io.open = refuse
import training.cli, training.rows.readers
assert not {"torch", "transformers"} & set(sys.modules)
"""
    run_python(code, tmp_path)


def test_the_door_is_cheap_to_import(tmp_path: Path) -> None:
    code = """
import sys, training
assert not {"torch", "numpy", "transformers", "adapters"} & set(sys.modules)
training.load_recipe("task")
assert "transformers" not in sys.modules
"""
    run_python(code, tmp_path)


def test_commands_say_what_the_user_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"], prog="lora-fusion train")
    text = capsys.readouterr().out
    assert "lora-fusion train run safety" in text
    assert "python -m training " not in text.replace("torchrun", "")


def test_making_the_base_needs_no_more_of_the_trainer_than_a_container_has(tmp_path: Path) -> None:
    code = """
import sys, training.base
ours = {name for name in sys.modules if name.partition(".")[0] == "training"}
assert ours == {"training", "training.base", "training.builtin", "training.builtin.base"}, ours
"""
    run_python(code, tmp_path)
