"""The Bento: built apart from the user's store, its Dockerfile read, its code served from its own folder."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.service.conftest import ROOT, Server, launch, stop, wait_ready

CHAT = {"messages": [{"role": "user", "content": "Count to ten."}], "max_tokens": 4, "temperature": 0}
MIX = "0.6*narrow + 0.4*wide"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BentoML home that holds the built Bento."""
    folder = tmp_path_factory.mktemp("bentoml")
    environment = {**os.environ, "BENTOML_HOME": str(folder), "BENTOML_DO_NOT_TRACK": "1"}
    command = [sys.executable, "-m", "bentoml", "build"]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def bento(home: Path) -> Path:
    (folder,) = (f for f in (home / "bentos/lora-fusion").iterdir() if f.is_dir())
    return folder


def test_the_dockerfile_is_fit_for_production(bento: Path) -> None:
    lines = [line.strip() for line in (bento / "env/docker/Dockerfile").read_text().splitlines()]
    text = "\n".join(lines)
    users = [line for line in lines if line.startswith("USER ")]
    assert users[-1] == "USER bentoml"
    assert lines.index(users[-1]) < lines.index('ENTRYPOINT ["python", "-m", "service"]')
    assert "EXPOSE 3000" in lines and "FUSION_PORT=3000" in text and "FUSION_HOST=0.0.0.0" in text
    assert "HEALTHCHECK" in text and "/readyz" in text
    assert 'VOLUME ["/data", "/adapters"]' in lines
    assert "FUSION_DATA=/data" in text and "FUSION_ADAPTER_ROOTS=/adapters" in text
    assert "chown bentoml:bentoml /data /adapters" in text
    # The pinned set through the project's own installer, which finds torch's CPU build.
    assert "RUN python requirements/install.py /app/.venv requirements/runtime.txt" in lines
    assert (bento / "src/requirements/runtime.txt").read_text() == (ROOT / "requirements/runtime.txt").read_text()


def test_the_bento_holds_the_service_and_nothing_of_the_machine(bento: Path) -> None:
    files = {str(f.relative_to(bento / "src")) for f in (bento / "src").rglob("*") if f.is_file()}
    assert {"service/app.py", "service/engine/worker.py", "adapters/fuse.py", "training/base.py"} <= files
    if (ROOT / "examples/adapters/task").exists():
        assert "examples/adapters/task/adapter_model.safetensors" in files
    assert not [f for f in files if f.startswith((".", "tests", "benchmarks")) or "__pycache__" in f]
    assert sum((bento / "src" / f).stat().st_size for f in files) < 20 * 2**20


def test_the_served_bento_mixes(server: Server, home: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process, url = launch(
        tmp_path / "data",
        server.adapters["wide"].parent,
        log,
        command=["-m", "bentoml", "serve", "lora-fusion:latest", "--host", "127.0.0.1", "--port", "{port}"],
        cwd=tmp_path,  # nothing of the repository can be imported from here
        BENTOML_HOME=str(home),
        BENTOML_DO_NOT_TRACK="1",
        FUSION_ADAPTERS=f"wide={server.adapters['wide']},narrow={server.adapters['narrow']}",
        FUSION_MIXED="required",
    )
    try:
        wait_ready(process, url, log)
        assert httpx.get(f"{url}/readyz").json()["mixing"]["proven"]
        assert str(ROOT / "service") not in log.read_text()
        answers = [
            httpx.post(f"{at}/v1/chat/completions", json={**CHAT, "model": MIX}, timeout=300)
            for at in (url, server.url)
        ]
        assert [a.headers["x-fusion-mode"] for a in answers] == ["mixed", "mixed"]
        assert answers[0].json()["choices"][0]["message"] == answers[1].json()["choices"][0]["message"]
    finally:
        stop(process)
