"""The wheel, installed beside the pinned dependencies and used from an empty folder, as a stranger would."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from benchmarks.servers import free_port
from tests.conftest import ROOT, stop, wait_ready

PACKAGES = ("adapters", "eval_clients", "lora_fusion", "service", "training")


@dataclass(frozen=True)
class Installation:
    """A virtual environment that has the wheel, and an empty folder to work in."""

    wheel: Path
    bin: Path
    empty: Path

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        program, *args = command
        return subprocess.run(
            [self.bin / program, *args],
            cwd=self.empty,
            env=os.environ | {"PYTHONPATH": ""} | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    place = tmp_path_factory.mktemp("wheel")
    tree = place / "tree"  # building leaves files in the tree
    for name in (*PACKAGES, "examples/adapters"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(place), str(tree)]
    subprocess.run([sys.executable, "-m", *build], check=True)
    (wheel,) = place.glob("lora_fusion-*.whl")
    uv, environment = str(Path(sys.executable).parent / "uv"), place / "environment"
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(environment)], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "pinned.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [uv, "pip", "install", "-q", "--no-deps", "--python", str(environment / "bin/python"), str(wheel)]
    subprocess.run(install, check=True)
    (place / "empty").mkdir()
    return Installation(wheel, environment / "bin", place / "empty")


def test_the_wheel_holds_every_file_of_the_packages(installation: Installation) -> None:
    with zipfile.ZipFile(installation.wheel) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    shipped = (ROOT / "examples/adapters").rglob("*")
    expected |= {f"lora_fusion/adapters/{p.relative_to(ROOT / 'examples/adapters')}" for p in shipped if p.is_file()}
    assert held == expected


def test_every_extra_the_command_names_exists() -> None:
    from lora_fusion.cli import COMMANDS

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {
        extra for command in COMMANDS.values() if command.extra for extra in command.extra.split(",")
    } <= extras.keys()


def test_the_command_fuses_what_ships(installation: Installation) -> None:
    shipped = ["--adapter", "task=shipped:task", "--adapter", "safety=shipped:safety"]
    done = installation.run("lora-fusion", "fuse", "0.6*task + 0.4*safety", *shipped, "--out", "fused", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rank"] == 16
    assert (installation.empty / "fused/adapter_model.safetensors").is_file()


def test_the_command_checks_training_data(installation: Installation) -> None:
    (installation.empty / "rows.jsonl").write_text('{"prompt": "Count to three.", "answer": "One, two, three."}\n')
    done = installation.run("lora-fusion", "train", "data", "check", "rows.jsonl")
    assert done.returncode == 0, done.stderr


def test_every_command_has_help(installation: Installation) -> None:
    overview = installation.run("lora-fusion", "--help")
    assert overview.returncode == 0
    commands = ("serve", "settings", "verify", "fuse", "plan", "diff", "show", "methods", "train", "eval", "sweep")
    with ThreadPoolExecutor(2) as pool:
        helps = list(pool.map(lambda command: installation.run("lora-fusion", command, "--help"), commands))
    for command, said in zip(commands, helps, strict=True):
        assert f"  {command} " in overview.stdout
        assert said.returncode == 0, said.stderr
        assert said.stdout.startswith(f"usage: lora-fusion {command}"), said.stdout[:200]


def test_a_misspelt_command_is_answered_with_the_nearest(installation: Installation) -> None:
    done = installation.run("lora-fusion", "serv")
    assert (done.returncode, done.stderr) == (2, "error: unknown command 'serv': did you mean 'serve'?\n")


def test_a_reader_that_has_seen_enough_is_no_error(installation: Installation) -> None:
    command = f"set -o pipefail; {installation.bin}/lora-fusion settings | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=installation.empty)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_serves_from_an_empty_folder(installation: Installation) -> None:
    port, log = free_port(), installation.empty / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [installation.bin / "lora-fusion", "serve", "--port", str(port), "--engine-args", "--max-model-len 512"],
            cwd=installation.empty,
            env=os.environ | {"PYTHONPATH": "", "VLLM_CPU_KVCACHE_SPACE": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(process, url, log)
        body = {"model": "balanced", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 4}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-fusion-mode"] == "mixed"
    finally:
        stop(process)
