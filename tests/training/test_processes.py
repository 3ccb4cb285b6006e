"""Several real processes under torchrun: the same numbers, resuming with another count, and death of one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import adapters
from tests.conftest import family

ROOT = Path(__file__).parents[2]
SAME = ["train.epochs=5", "lora.alpha=16", "checkpoint.every=10"]


def start(processes: int, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "training", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True, **pipes)  # type: ignore[call-overload,no-any-return]  # pipes' types are mixed


def run_to_end(processes: int, *arguments: str) -> str:
    process = start(processes, *arguments)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def train(processes: int, recipe: Path, out: Path, *overrides: str) -> None:
    run_to_end(
        processes, "run", str(recipe), "--out", str(out), *(word for text in overrides for word in ("--set", text))
    )


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def adapter_error(run: Path, reference: Path) -> float:
    """The largest relative difference of a ΔW."""
    a, b = adapters.load(run / "adapter"), adapters.load(reference / "adapter")
    return max(float((a.delta(name) - b.delta(name)).norm() / b.delta(name).norm()) for name in b.modules)


@pytest.fixture(scope="module")
def single_run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, Path]:
    """(recipe, run) of one process, 20 steps."""
    folder = tmp_path_factory.mktemp("processes")
    recipe = folder / "tiny.toml"
    recipe.write_text(
        f'[model]\nbase = "{tiny_base}"\n[lora]\nr = 4\n[data]\npath = "orders:12"\nmax_tokens = 900\n'
        "[train]\nbatch_rows = 3\nmicro_tokens = 1200\nlearning_rate = 1e-2\n"
    )
    train(1, recipe, folder / "one", *SAME)
    return recipe, folder / "one"


@pytest.fixture(scope="module")
def runs(single_run: tuple[Path, Path]) -> dict[int, Path]:
    """The same run of one process and of two."""
    recipe, alone = single_run
    train(2, recipe, alone.parent / "two", *SAME)
    return {1: alone, 2: alone.parent / "two"}


def test_two_processes_do_what_one_does(runs: dict[int, Path]) -> None:
    alone, two = runs[1], runs[2]
    assert len(losses(alone)) == 20
    assert losses(two) == pytest.approx(losses(alone), abs=1e-5)
    assert adapter_error(two, alone) < 1e-3
    tensors = load_file(two / "adapter/adapter_model.safetensors")
    halves = [part for name, t in tensors.items() if "lora_B" in name for part in t.chunk(2)]  # FSDP shards rows
    assert len(halves) == 8
    assert all(bool(part.any()) for part in halves)
    assert len(list((two / "checkpoints/step-00000020").glob("*.distcp"))) == 2


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_resumes_with_another_number_of_processes(
    runs: dict[int, Path], tmp_path: Path, before: int, after: int
) -> None:
    half = tmp_path / "half"
    shutil.copytree(runs[before], half)
    shutil.rmtree(half / "checkpoints/step-00000020")
    run_to_end(after, "resume", str(half))
    assert losses(half) == pytest.approx(losses(runs[1]), abs=1e-5)
    assert adapter_error(half, runs[1]) < 1e-3


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_others_stop_when_one_dies(single_run: tuple[Path, Path], tmp_path: Path, how: signal.Signals) -> None:
    recipe, _ = single_run
    arguments = ["run", str(recipe), "--out", str(tmp_path / "run"), "--set", "train.epochs=100000"]
    process = start(2, *arguments)
    try:
        wait_for(lambda: len(losses(tmp_path / "run")) > 2, tmp_path / "run/metrics.jsonl")
        workers = [pid for pid in family(process.pid) if pid != process.pid and b"training" in read_command(pid)]
        assert len(workers) == 2
        os.kill(workers[1], how)
        began = time.monotonic()
        output, _ = process.communicate(timeout=60)
        assert time.monotonic() - began < 60
        assert process.returncode != 0
        assert f"{how.name}" in output or f"exitcode  : {-how}" in output, output
        assert all(not Path(f"/proc/{pid}").exists() for pid in workers)
    finally:
        kill_family(process)


def test_a_killed_run_loses_at_most_the_interval(single_run: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, _ = single_run
    folder = tmp_path / "run"
    sets = ["train.epochs=60", "checkpoint.every=3", "checkpoint.keep=2"]
    arguments = ["run", str(recipe), "--out", str(folder), *(word for text in sets for word in ("--set", text))]
    process = start(1, *arguments)
    try:
        wait_for(lambda: len(losses(folder)) > 20, folder / "metrics.jsonl")
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        seen = losses(folder)
        known = sorted((folder / "checkpoints").glob("step-????????"))
        assert len(known) <= 3
        assert len(seen) - int(known[-1].name[5:]) <= 3
        run_to_end(1, "resume", str(folder))
        assert len(losses(folder)) == 240
        assert losses(folder)[: len(seen)] == pytest.approx(seen, abs=1e-6)
    finally:
        kill_family(process)


def read_command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def wait_for(ready: object, path: Path) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if path.exists() and callable(ready) and ready():
            return
        time.sleep(0.2)
    pytest.fail(f"{path} did not grow")


def kill_family(process: subprocess.Popen[str]) -> None:
    for pid in family(process.pid):
        os.kill(pid, signal.SIGKILL)
