"""The Bento: built apart from the user's store, its Dockerfile read, its code served from its own folder."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from adapters.files import adapter_path
from service.settings import Settings
from tests.conftest import ROOT, Server, family, launch, stop, wait_ready
from tests.deploy.dockerfile import Instruction, last, parse, variables
from tests.service.confinement import Group, confine, is_possible, limit, read_status

TAG = "lora-fusion:latest"
MIX = "0.6*narrow + 0.4*wide"
CHAT = {"messages": [{"role": "user", "content": "Count to ten."}], "max_tokens": 8, "temperature": 0}
# Writes the Dockerfile that `bentoml containerize` hands to Docker; BentoML has no command for it alone.
CONTAINERFILE = "import bentoml.container as c, sys; c.get_containerfile(*sys.argv[1:])"


@dataclass(frozen=True)
class Bento:
    """A built Bento: the BentoML home that holds it, its folder, and its files before anything ran in it."""

    home: Path
    folder: Path
    files: frozenset[str]

    def run(self, *arguments: str, cwd: Path = ROOT, **variables: str) -> None:
        """Run Python in `cwd` with this Bento's home as BentoML's."""
        environment = {**os.environ, "BENTOML_HOME": str(self.home), "BENTOML_DO_NOT_TRACK": "1"} | variables
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def bento(tmp_path_factory: pytest.TempPathFactory) -> Bento:
    home = tmp_path_factory.mktemp("bentoml")
    Bento(home, home, frozenset()).run("-m", "bentoml", "build")
    (folder,) = (f for f in (home / "bentos/lora-fusion").iterdir() if f.is_dir())
    files = frozenset(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    return Bento(home, folder, files)


@pytest.fixture(scope="module")
def instructions(bento: Bento) -> list[Instruction]:
    return parse((bento.folder / "env/docker/Dockerfile").read_text())


def test_the_container_runs_as_a_user_that_is_not_root_by_number(
    instructions: list[Instruction],
) -> None:
    user, group = last(instructions, "USER").split(":")
    assert int(user) > 0
    assert int(group) > 0
    keywords = [keyword for keyword, _ in instructions]
    after = keywords[len(keywords) - keywords[::-1].index("USER") :]
    assert set(after) == {"HEALTHCHECK", "ENTRYPOINT"}


def test_the_container_listens_on_the_port_it_exposes(instructions: list[Instruction]) -> None:
    assert [text for keyword, text in instructions if keyword == "EXPOSE"] == ["3000"]
    assert variables(instructions)["FUSION_PORT"] == "3000"
    assert variables(instructions)["FUSION_HOST"] == "0.0.0.0"


def test_registry_and_store_and_adapters_are_mounts_the_user_may_write(
    instructions: list[Instruction],
) -> None:
    assert json.loads(last(instructions, "VOLUME")) == ["/data", "/adapters"]
    assert variables(instructions)["FUSION_DATA"] == "/data"
    assert variables(instructions)["FUSION_ADAPTER_ROOTS"] == "/adapters"
    ending = f"mkdir -p /data /adapters && chown {last(instructions, 'USER')} /data /adapters"
    (step,) = (at for at, (_, text) in enumerate(instructions) if text.endswith(ending))
    assert step < [keyword for keyword, _ in instructions].index("VOLUME")  # later changes would be lost


def test_the_image_makes_the_base_it_serves(instructions: list[Instruction]) -> None:
    assert ("RUN", f"python -m training.base {variables(instructions)['FUSION_BASE']}") in instructions


def test_the_image_installs_the_pinned_set_and_names_no_index(bento: Bento, instructions: list[Instruction]) -> None:
    runs = [text for keyword, text in instructions if keyword == "RUN"]
    installs = [text for text in runs if "install.py" in text]
    assert len(installs) == 1
    assert installs[0].endswith("python requirements/install.py /app/.venv requirements/runtime.txt")
    pins = "requirements/runtime.txt"
    assert (bento.folder / "src" / pins).read_text() == (ROOT / pins).read_text()
    assert not [text for text in runs if "://" in text or "index-url" in text or "find-links" in text]


def test_containerize_builds_the_same_image(bento: Bento, instructions: list[Instruction], tmp_path: Path) -> None:
    # BentoML unpacks the Bento in the temporary folder and refuses a template outside the current one.
    bento.run("-c", CONTAINERFILE, TAG, str(tmp_path / "made"), cwd=tmp_path, TMPDIR=str(tmp_path))
    containerized = parse((tmp_path / "made").read_text())
    caches = re.compile(r"(--mount=\S+ )+")  # BuildKit's; docker build of the Bento's folder goes without
    assert [(keyword, caches.sub("", text)) for keyword, text in containerized] == instructions


def test_all_that_the_dockerfile_copies_is_in_the_bento(bento: Bento, instructions: list[Instruction]) -> None:
    sources = [text.split()[-2] for keyword, text in instructions if keyword == "COPY"]
    assert sources
    assert all((bento.folder / source).is_dir() for source in sources)


def test_the_entry_point_runs_from_the_source_folder_of_the_bento(
    bento: Bento, instructions: list[Instruction]
) -> None:
    environment = {**os.environ, "PYTHONPATH": "", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [*json.loads(last(instructions, "ENTRYPOINT")), "--help"]
    assert last(instructions, "WORKDIR") == "$BENTO_PATH/src"
    said = subprocess.run(command, cwd=bento.folder / "src", env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "FUSION_PORT" in said.stdout


def test_the_bento_holds_the_service_and_the_shipped_adapters(bento: Bento) -> None:
    for name in ("service/bento/app.py", "service/engine/worker.py", "adapters/algebra/fuse.py", "training/base.py"):
        assert f"src/{name}" in bento.files
    for pair in Settings().adapters:
        folder = adapter_path(pair.partition("=")[2]).relative_to(ROOT)
        assert f"src/{folder}/adapter_model.safetensors" in bento.files


def test_the_bento_is_small_and_holds_nothing_else_of_the_machine(bento: Bento) -> None:
    top = {name.split("/")[1] for name in bento.files if name.startswith("src/")}
    known = {"service", "adapters", "training", "requirements", "examples", "LICENSE", "bentofile.yaml"}
    assert top == known
    assert {name for name in bento.files if name.startswith("src/training/")} == {
        "src/training/__init__.py",
        "src/training/__init__.pyi",
        "src/training/base.py",
        "src/training/builtin/__init__.py",
        "src/training/builtin/base.py",
    }
    assert not [name for name in bento.files if "__pycache__" in name]
    assert sum((bento.folder / name).stat().st_size for name in bento.files) < 20 * 2**20
    texts = [bento.folder / name for name in bento.files if not name.endswith(".safetensors")]
    assert not [path for path in texts if str(ROOT) in path.read_text()]


def serve(bento: Bento, server: Server, place: Path, group: Group | None) -> tuple[subprocess.Popen[bytes], str]:
    """Serve the Bento as its image does, with the shipped adapters and two of `server`'s.

    Where this machine allows it, confined as the documented `docker run` is: it may write to the temporary folder
    alone, which holds its data, has no capability, finds the repository's own code gone, and is in `group`.
    """
    writable = [Path(tempfile.gettempdir())]
    hidden = [ROOT / package for package in ("service", "adapters", "training")]
    own = [f"{name}={server.adapters[name]}" for name in ("wide", "narrow")]
    return launch(
        place / "data",
        server.adapters["wide"].parent,
        place / "log",
        command=["-m", "bentoml", "serve", TAG, "--host", "127.0.0.1", "--port", "{port}"],
        cwd=place,
        before=confine(writable=writable, hidden=hidden, group=group) if is_possible() else (),
        PYTHONPATH="",
        HOME=str(place),
        PYTHONDONTWRITEBYTECODE="",
        BENTOML_HOME=str(bento.home),
        BENTOML_DO_NOT_TRACK="1",
        BENTOML_CONTAINERIZED="true",  # as in the image: a worker that dies ends the server
        FUSION_ADAPTERS=",".join([*Settings().adapters, *own]),
        FUSION_PROFILES=";".join(Settings().profiles),
        FUSION_MIXED="required",
        VLLM_CPU_KVCACHE_SPACE="1",
    )


@pytest.fixture
def group() -> Iterator[Group | None]:
    """The limits that the documentation states, for a key-value cache of 1 GiB."""
    text = (ROOT / "deploy/README.md").read_text()
    (pids,) = {int(number) for number in re.findall(r"--pids-limit (\d+)", text)}
    (more,) = {int(number) for number in re.findall(r"needs about (\d+) GiB on top of it", text)}
    with limit(f"lora-fusion-test-{os.getpid()}", memory=(more + 1) * 2**30, pids=pids) as made:
        yield made


def test_the_served_bento_answers_within_the_container_s_limits(
    server: Server, bento: Bento, instructions: list[Instruction], group: Group | None, tmp_path: Path
) -> None:
    process, url = serve(bento, server, tmp_path, group)
    check = ["sh", "-c", last(instructions, "HEALTHCHECK").partition("CMD ")[2]]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"FUSION_PORT": url.rpartition(":")[2], "PATH": path}
    try:
        assert subprocess.run(check, env=environment, capture_output=True).returncode != 0
        wait_ready(process, url, tmp_path / "log")
        assert subprocess.run(check, env=environment, capture_output=True).returncode == 0
        assert httpx.get(f"{url}/readyz").json()["mixing"]["proven"]
        # What is served is the Bento's own code, in BentoML's worker and in vLLM's, whatever else is installed.
        for module in ("bento/__pycache__/app", "engine/__pycache__/worker"):
            assert list((bento.folder / "src/service").glob(f"{module}.*.pyc"))
        if is_possible():
            for pid in family(process.pid):
                status = read_status(pid)
                assert (int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, 0, "1")
            if group is not None:
                assert all(set(family(process.pid)) <= members for members in group.members)
        served = {model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]}
        assert {"task", "safety", "balanced"} <= served
        ours, theirs, balanced = (
            httpx.post(f"{at}/v1/chat/completions", json={**CHAT, "model": model, "logprobs": True}, timeout=300)
            for at, model in ((url, MIX), (server.url, MIX), (url, "balanced"))
        )
        assert [a.headers["x-fusion-mode"] for a in (ours, theirs, balanced)] == ["mixed"] * 3
        answers = [answer.json()["choices"][0] for answer in (ours, theirs)]
        assert answers[0]["message"] == answers[1]["message"]
        mine, other = ([t["logprob"] for t in a["logprobs"]["content"]] for a in answers)
        assert mine == pytest.approx(other, abs=1e-4)
        if group is not None:
            assert (group.refused_forks, group.kills) == (0, 0)
    finally:
        stop(process)
    assert process.returncode == 0
    deadline = time.monotonic() + 10
    while _group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _group_lives(process.pid)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
