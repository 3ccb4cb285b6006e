"""The public door: what `adapters` exports, and what it may import."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import adapters

ROOT = Path(adapters.__file__).parent
ALLOWED = {*sys.stdlib_module_names, "torch", "numpy", "safetensors"}


def key(name: str) -> tuple[int, str]:
    """The order ruff keeps: constants, classes, functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_all_is_sorted_and_everything_in_it_exists() -> None:
    assert adapters.__all__ == sorted(set(adapters.__all__), key=key)
    assert all(not inspect.ismodule(getattr(adapters, name)) for name in adapters.__all__)


def test_all_is_complete() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    imported = {a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert set(adapters.__all__) == imported
    promised = {
        "load",
        "save",
        "parse",
        "fuse",
        "plan",
        "LoraAdapter",
        "FusionReport",
        "METHODS",
        "Recipe",
        "Stack",
    }
    promised |= {"Store", "stack", "fusion_digest", "FusionError", "RecipeError", "AdapterError", "LossError"}
    assert promised <= imported


def test_only_the_standard_library_torch_numpy_and_safetensors_are_imported() -> None:
    for file in ROOT.glob("*.py"):
        if file.name == "heatmap.py":  # asks for matplotlib when a picture is wanted
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED, file
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                assert node.module.split(".")[0] in ALLOWED, file


def test_files_stay_small() -> None:
    assert {f.name: n for f in ROOT.glob("*.py") if (n := len(f.read_text().splitlines())) > 250} == {}
