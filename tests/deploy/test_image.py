"""The images, built and run: as their own user, with a root that is read-only, without a compiler. By `make soak`."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.common import machine, stamp
from tests.conftest import ENGINE, ROOT, Server, family, stop, wait_ready
from tests.deploy.dockerfile import parse
from tests.deploy.images import Builder, missing
from tests.service.confinement import read_status

pytestmark = [pytest.mark.soak, pytest.mark.skipif(bool(missing()), reason=missing())]

RESULT = ROOT / "benchmarks/results/images.json"
COMPILERS = {"cc", "c++", "gcc", "g++", "clang", "clang++", "ld", "as", "nvcc"}
INSTALLERS = {"pip", "pip3", "uv"}
MIX = "0.6*narrow + 0.4*wide"
CHAT = {
    "model": MIX,
    "messages": [{"role": "user", "content": "Count to ten."}],
    "max_tokens": 8,
    "temperature": 0,
    "logprobs": True,
}


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    builder = Builder(tmp_path_factory.mktemp("images"))
    builder.make_base("python:3.11-slim-bookworm", "python:3.11-slim")
    yield builder
    builder.buildah("rm", "--all")
    builder.buildah("rmi", "--all", "--force")


def record(name: str, **figures: float | str) -> None:
    """Keep the last result, dated."""
    RESULT.write_text(json.dumps({name: {**stamp("make soak"), "machine": machine(), **figures}}, indent=1) + "\n")


def inside(pid: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command where the process `pid` runs, as root."""
    return subprocess.run(
        ["nsenter", "--target", str(pid), "--mount", "--root", "--wd", "--", *command], capture_output=True, text=True
    )


def check_confinement(pid: int, user: str) -> None:
    """All processes are the image's user's, without a capability; and nothing but /data and /tmp can be written."""
    for each in family(pid):
        status = read_status(each)
        assert (status["Uid"].split(), status["Gid"].split()) == ([user.split(":")[0]] * 4, [user.split(":")[1]] * 4)
        assert (int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, 0, "1")
    for folder in ("/", "/app", "/base", "/adapters", "/home", "/var/tmp"):
        assert "Read-only file system" in inside(pid, "touch", f"{folder}/written").stderr


def compare_answers(image_url: str, server_url: str) -> float:
    """Largest difference of a mix's log-probabilities between the image and the repository's server, below 1e-4."""
    for each in ("wide", "narrow"):
        answer = httpx.post(f"{image_url}/v1/adapters", json={"name": each, "path": f"/adapters/{each}"}, timeout=300)
        assert answer.status_code == 201, answer.text
    ours, theirs = (httpx.post(f"{at}/v1/chat/completions", json=CHAT, timeout=300) for at in (image_url, server_url))
    assert ours.headers["x-fusion-mode"] == "mixed"
    answers = [answer.json()["choices"][0] for answer in (ours, theirs)]
    assert answers[0]["message"] == answers[1]["message"]
    mine, other = ([t["logprob"] for t in a["logprobs"]["content"]] for a in answers)
    assert mine == pytest.approx(other, abs=1e-4)
    shipped = httpx.post(f"{image_url}/v1/chat/completions", json=CHAT | {"model": "balanced"}, timeout=300)
    assert shipped.headers["x-fusion-mode"] == "mixed"
    largest: float = max(abs(a - b) for a, b in zip(mine, other, strict=True))
    return largest


def test_the_image_answers_exactly_as_its_own_user_on_a_root_that_is_read_only(
    builder: Builder, server: Server, tmp_path: Path
) -> None:
    dockerfile = ROOT / "deploy/Dockerfile"
    began = time.monotonic()
    image = builder.build(dockerfile, ROOT)
    build_s = time.monotonic() - began
    assert image.programs() & (COMPILERS | INSTALLERS) == set()
    stages = sum(keyword == "FROM" for keyword, _ in parse(dockerfile.read_text()))

    (tmp_path / "data").mkdir()
    os.chown(tmp_path / "data", *map(int, image.user.split(":")))
    adapters = shutil.copytree(server.adapters["wide"].parent, tmp_path / "adapters")
    for path in (adapters, *adapters.rglob("*")):
        path.chmod(0o755)  # the image's user is not the one who trained them
    log = tmp_path / "log"
    began = time.monotonic()
    process, url = image.run(tmp_path / "data", adapters, log, FUSION_ENGINE_ARGS=ENGINE, FUSION_MIXED="required")
    check = image.configuration["Healthcheck"]["Test"][1]
    health = ("env", f"PATH={image.environment['PATH']}:{os.defpath}", f"FUSION_PORT={url.rpartition(':')[2]}")
    try:
        wait_ready(process, url, log)
        ready_s = time.monotonic() - began
        healthy = inside(process.pid, *health, "sh", "-c", check)
        assert healthy.returncode == 0, healthy.stderr
        check_confinement(process.pid, image.user)
        assert httpx.get(f"{url}/readyz").json()["mixing"]["proven"]
        largest = compare_answers(url, server.url)
        database = inside(process.pid, "/app/.venv/bin/python", "-c", "import psycopg; print(psycopg.pq.version())")
        assert database.returncode == 0, database.stderr
    finally:
        began = time.monotonic()
        stop(process)
    stop_s = time.monotonic() - began
    assert process.returncode == 0, log.read_text()[-3000:]
    record(
        "deploy/Dockerfile",
        megabytes=image.size // 10**6,
        stages=stages,
        build_s=round(build_s),
        ready_s=round(ready_s),
        stop_s=round(stop_s, 1),
        user=image.user,
        largest_logprob_difference=largest,
    )
