"""The public doors: what `adapters` exports, and what importing it costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import adapters
from adapters import recipes

ROOT = Path(adapters.__file__).parent
ALLOWED = {*sys.stdlib_module_names, "torch", "numpy", "safetensors", "adapters"}


def test_every_public_name_can_be_imported_and_listed() -> None:
    for door in (adapters, recipes):
        assert all(getattr(door, name) is not None for name in door.__all__)
        assert set(door.__all__) <= set(dir(door))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        adapters.__getattr__("nothing")  # type: ignore[attr-defined]  # types do not see it, so that typos are found


def test_types_and_runtime_find_a_name_in_the_same_place() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    homes: dict[str, tuple[str, ...]] = vars(adapters)["_HOMES"]
    assert typed == {name: f"adapters.{home}" for home, names in homes.items() for name in names}
    imported = {a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert set(adapters.__all__) == set(typed) | imported - {"TYPE_CHECKING"}


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
