"""The public doors: what `adapters` exports, and what importing it costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import adapters

ROOT = Path(adapters.__file__).parent
ALLOWED = {*sys.stdlib_module_names, "torch", "numpy", "safetensors", "lazy_loader", "adapters"}


@pytest.mark.parametrize("door", ["adapters", "adapters.recipes", "adapters.files"])
def test_a_door_opens_without_torch(door: str) -> None:
    code = f"import sys, {door}; print(*{{'torch', 'numpy', 'safetensors'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_only_the_standard_library_torch_numpy_and_safetensors_are_imported() -> None:
    for file in ROOT.rglob("*.py"):
        if file.name == "heatmap.py":  # asks for matplotlib when a picture is wanted
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED, file
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                assert node.module.split(".")[0] in ALLOWED, file
