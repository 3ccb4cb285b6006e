"""The project as a whole: who may import what, no clash of names, a README that works."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tables
from tests.conftest import ROOT, Server

PACKAGES = ("adapters", "service", "training", "eval_clients")


def imports(path: Path) -> set[str]:
    """Top-level names of all absolute imports of a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return {name.partition(".")[0] for name in found}


def who(package: str, name: str) -> set[str]:
    files = (ROOT / package).rglob("*.py")
    return {str(f.relative_to(ROOT)) for f in files if name in imports(f)}


def test_imports_point_one_way() -> None:
    assert who("service", "bentoml") == {"service/app.py"}
    assert all(file.startswith("service/engine/") for file in who("service", "vllm"))
    for package in ("adapters", "training"):
        assert not who(package, "service") and not who(package, "vllm") and not who(package, "bentoml")
    assert not who("adapters", "training")


def test_no_other_distribution_owns_our_names() -> None:
    owners = importlib.metadata.packages_distributions()
    assert {name: owners[name] for name in PACKAGES if set(owners.get(name, [])) - {"lora-fusion"}} == {}


def test_the_tables_in_the_readmes_are_the_recorded_figures() -> None:
    assert all(tables.filled(file) == (ROOT / file).read_text() for file in tables.TABLES)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def shipped(server: Server) -> Server:
    """The test server with what `make serve` has."""
    with server.http() as http:
        for name in ("task", "safety"):
            folder = ROOT / "examples/adapters" / name
            answer = http.post("/v1/adapters", json={"name": name, "path": str(folder)})
            assert answer.status_code == 201, answer.text
        assert http.put("/v1/fusions/balanced", json={"fusion": "0.6*task + 0.4*safety"}).status_code == 201
    return server


def test_what_the_readme_shows_works(shipped: Server) -> None:
    ran = 0
    for language, command in (("bash", ["bash", "-euc"]), ("python", [sys.executable, "-c"])):
        for block in blocks(language):
            code = block.replace("http://127.0.0.1:3000", shipped.url).replace("curl -s", "curl -sf")
            done = subprocess.run([*command, code], cwd=ROOT, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, block + done.stdout + done.stderr
            ran += 1
    assert ran >= 3
    with shipped.http() as http:
        for path in ("/v1/fusions/careful", "/v1/fusions/balanced"):
            assert http.delete(path).status_code == 204
        for name in ("polite", "task", "safety"):
            assert http.delete(f"/v1/adapters/{name}").status_code == 204
