"""The command line: 0 when done, 2 and one line on stderr for bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adapters import fuse, load, parse, save
from adapters.cli import main
from tests.adapters.samples import adapter


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    save(adapter(1), tmp_path / "task")
    save(adapter(2), tmp_path / "safety")
    return ["--adapter", f"task={tmp_path / 'task'}", "--adapter", f"safety={tmp_path / 'safety'}"]


def test_fuse_writes_what_the_library_would(tmp_path: Path, folders: list[str]) -> None:
    out = tmp_path / "out"
    assert main(["fuse", "0.6*task + 0.4*safety", *folders, "--out", str(out)]) == 0
    expected, report = fuse(parse("0.6*task + 0.4*safety"), {"task": adapter(1), "safety": adapter(2)})
    assert load(out).digest == expected.digest
    provenance = json.loads((out / "fusion.json").read_text())
    assert provenance["text"] == report.recipe
    assert provenance["parents"] == {"task": adapter(1).digest, "safety": adapter(2).digest}


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (["show", "{task}"], "digest"),
        (["plan", "svd(task, rank=2)", "--adapter", "task={task}"], "verdict"),
        (["fuse", "task", "--adapter", "task={task}", "--out", "{out}"], "out"),
        (["diff", "{task}", "{safety}"], "cosine"),
        (["methods"], "methods"),
    ],
)
def test_every_command_speaks_text_and_json(
    tmp_path: Path, folders: list[str], capsys: pytest.CaptureFixture[str], command: list[str], key: str
) -> None:
    places = {name: str(tmp_path / name) for name in ("task", "safety")}
    assert main([part.format(out=tmp_path / "text", **places) for part in command]) == 0
    assert capsys.readouterr().out.strip()
    assert main([part.format(out=tmp_path / "json", **places) for part in command] + ["--json"]) == 0
    assert key in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "task +"], "position 6"),
        (["plan", "taks"], "did you mean 'task'"),
        (["plan", "task", "--max-rank", "0"], "max_rank"),
        (["plan", "task", "--max-rank", "2", "--strict"], "strict"),
        (["plan", "task", "--adapter", "nonsense"], "NAME=PATH"),
        (["plan", "task", "--adapter", "task=elsewhere"], "twice"),
        (["plan", "other", "--adapter", "other=nowhere"], "missing_config"),
        (["fuse", "task", "--out", "."], "already exists"),
        (["fuse", "answer(fade(1..0, 4)*task)", "--out", "new"], "serve it, or fuse one phase"),
        (["fuse", "gate(1*task, by=risk, task in 0..1)", "--out", "new"], "the gate 'risk' chooses"),
        (["plan", "[1, 2]*task"], "expected one for each component"),
    ],
)
def test_bad_input_is_one_line_and_exit_two(
    folders: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main([*arguments[:2], *folders, *arguments[2:]]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in captured.err


def test_a_recipe_may_begin_with_a_sign(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("-1*task", "-.5*task+1*safety"):
        assert main(["plan", text, *folders, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["recipe"] == parse(text).format()


def test_as_a_program() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "adapters", *arguments], capture_output=True, text=True)

    described = run("--help")
    assert described.returncode == 0
    assert "0.6*task + 0.4*safety" in described.stdout
    refused = run("show", "nowhere")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert run("dance").returncode == 2


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    save(adapter(1), tmp_path / "task")
    command = [sys.executable, "-m", "adapters", "show", str(tmp_path / "task")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_help_and_errors_name_the_program_that_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"], prog="lora-fusion")
    described = capsys.readouterr().out
    assert "usage: lora-fusion" in described
    assert 'lora-fusion fuse "0.6*task' in described
    assert "python -m" not in described


def test_a_recipe_of_phases_is_planned_phase_by_phase(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = "gate(steps(prompt: 0, 4: 0.2)*task + 1*safety, by=risk, safety in 0..1)"
    assert main(["plan", recipe, *folders]) == 0
    text = capsys.readouterr().out
    assert "from the prompt on:" in text
    assert "from token 4 of the answer on:" in text
    assert "note: the gate 'risk' chooses" in text
    assert main(["plan", recipe, *folders, "--rank", "2", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [(row["start"], row["recipe"], row["rank"]) for row in content["phases"]] == [
        ("prompt", "1*safety + 0*task", 2),
        (4, "1*safety + 0.2*task", 2),
    ]
