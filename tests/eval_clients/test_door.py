"""The public door of `eval_clients`."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["eval_clients", "eval_clients.cli"])
def test_benchmarks_do_without_torch_and_matplotlib(module: str) -> None:
    code = f"import sys, {module}; print(*{{'torch', 'matplotlib', 'adapters.algebra'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
