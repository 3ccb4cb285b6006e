"""The public door of `eval_clients`."""

import ast
import subprocess
import sys

import pytest

import eval_clients
from tests.conftest import ROOT


def test_every_public_name_is_found_where_types_see_it() -> None:
    tree = ast.parse((ROOT / "eval_clients/__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(typed) == set(eval_clients.__all__)
    for name, module in typed.items():
        assert getattr(eval_clients, name) is getattr(sys.modules[str(module)], name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        eval_clients.__getattr__("nothing")  # type: ignore[attr-defined]  # types do not see it, so that typos are found


@pytest.mark.parametrize("module", ["eval_clients", "eval_clients.cli"])
def test_benchmarks_do_without_torch_and_matplotlib(module: str) -> None:
    code = f"import sys, {module}; print(*{{'torch', 'matplotlib', 'adapters.algebra'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
