"""The examples: notebooks without outputs that run, and the Llama-2 script as far as can be had without weights."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from eval_clients.cli import build_parser
from eval_clients.sweeps.points import expand
from tests.conftest import ROOT, Server
from training.cli import build_parser as build_training_parser
from training.recipe import load_recipe

NOTEBOOKS = sorted((ROOT / "examples/notebooks").glob("*.ipynb"))
LLAMA = ROOT / "examples/llama2"
RECORDER = """#!/bin/sh
for word in "$@"; do printf '%s\\037' "$word"; done >> "$RECORD"
echo >> "$RECORD"
[ "$2" = service ] && sleep 5
exit 0
"""


def test_notebooks_carry_no_outputs() -> None:
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert cells
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells), path.name


@pytest.mark.soak
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_against_a_running_service(path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    with server.http() as http:
        for name in ("task", "safety"):
            answer = http.post("/v1/adapters", json={"name": name, "path": str(ROOT / "examples/adapters" / name)})
            assert answer.is_success, answer.text
    monkeypatch.setenv("FUSION_URL", server.url)
    monkeypatch.setenv("PATH", f"{ROOT / '.venv/bin'}:{os.environ['PATH']}")
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]  # nbformat has no types
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    texts = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "Traceback" not in texts
    assert "error:" not in texts


@pytest.mark.parametrize("name", ["task", "safety", "rival"])
def test_the_llama_recipes_are_read_without_warnings(name: str) -> None:
    config, warnings = load_recipe(LLAMA / f"{name}.toml")
    assert warnings == []
    assert config.model.base == "meta-llama/Llama-2-7b-chat-hf"
    assert (config.lora.r, config.lora.alpha, config.lora.targets) == (8, 32, ("q_proj", "v_proj"))


def test_every_command_of_the_llama_script_exists(tmp_path: Path) -> None:
    bin_, record = tmp_path / "bin", tmp_path / "record"
    bin_.mkdir()
    (tmp_path / "sets/hexphi").mkdir(parents=True)
    for name, text in (("python", RECORDER), ("curl", "#!/bin/sh\nexit 0\n")):
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    environment = {
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "PYTHON": str(bin_ / "python"),
        "RECORD": str(record),
        "OUT": str(tmp_path / "out"),
        "DATA": str(tmp_path / "sets"),
        "TASK_TRAIN": "train.jsonl",
        "TASK_TEST": "test.jsonl",
        "JUDGE": "grader",
        "JUDGE_URL": "http://127.0.0.1:9/v1",
    }
    subprocess.run(["sh", str(LLAMA / "run.sh")], cwd=ROOT, env=environment, check=True, timeout=60)
    commands = [line.split("\037")[:-1] for line in record.read_text().splitlines()]
    runs = [command[command.index("training") + 1 :] for command in commands if "training" in command]
    assert [Path(build_training_parser().parse_args(run).recipe).stem for run in runs] == ["task", "safety", "rival"]
    assert ["-m", "service"] in commands
    sweep, mmlu = (build_parser("eval").parse_args(c[2:]) for c in commands if c[:2] == ["-m", "eval_clients"])
    assert mmlu.command == "mmlu"
    assert sweep.tasks == "xstest,task,hexphi"
    assert sweep.judge == "grader"
    assert len(expand(sweep.recipe, sweep.grid)) == 43
