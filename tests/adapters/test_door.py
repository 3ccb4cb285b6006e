"""The public door: what `adapters` exports, and what it may import."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import adapters

ROOT = Path(adapters.__file__).parent
ALLOWED = {*sys.stdlib_module_names, "torch", "numpy", "safetensors", "adapters"}


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
    for file in ROOT.rglob("*.py"):
        if file.name == "heatmap.py":  # asks for matplotlib when a picture is wanted
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED, file
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                assert node.module.split(".")[0] in ALLOWED, file
