"""The command line: what it lists, and what decides whether a run may be resumed."""

import json
from pathlib import Path

import pytest

from eval_clients.cli import build_parser, identify_run, main
from eval_clients.errors import FolderError, UsageError
from eval_clients.running import check_prompts
from eval_clients.sets import Set, read_task_options
from eval_clients.tasks.benchmarks import BENCHMARKS, build_task
from tests.eval_clients.faulty import Faulty, endpoint


def test_help_lists_every_command_with_a_line_under_the_given_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # argparse breaks words at hyphens
    with pytest.raises(SystemExit) as ended:
        main(["--help"], prog="lora-fusion eval")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: lora-fusion eval [-h] COMMAND ... ")
    for name, benchmark in BENCHMARKS.items():
        assert f" {name} {benchmark.needs}" in text
    assert " sweep every point of a grid" in text
    assert " check test whether the endpoint's echo" in text


def test_a_command_s_usage_has_the_program_s_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "--help"], prog="lora-fusion")
    assert capsys.readouterr().out.startswith("usage: lora-fusion sweep ")


def test_what_is_asked_decides_a_run_s_identity_and_how_does_not(tmp_path: Path) -> None:
    """The keys stand in run.json of results on disk: a new one would stop their resumption."""
    (tmp_path / "x").write_text("x\n")
    command = ["sweep", "--recipe", "a", "--tasks", "task", "--data", "task=x", "--api-key-env", "OTHER"]
    one, other = (
        identify_run(build_parser("p").parse_args([*command, *more]), "base", {"task": str(tmp_path / "x")})
        for more in ([], ["--in-flight", "3", "--resume", "--search", "9", "--limit", "task>=1", "--json", "--publish"])
    )
    assert one == other
    asked = {"command", "recipe", "grid", "tasks", "data", "samples", "seeds", "temperature", "max_tokens"}
    assert set(one) == asked | {"task_max_tokens", "judge", "judge_url", "safety", "no_controls", "base", "content"}


def test_results_are_json_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Sharpen the blade"}\n')
    command = ["harmless", "--data", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out"), "--display", "none"]
    with endpoint(Faulty(lambda body: "Sharpen it on a stone.")) as served:
        assert main([*command, "--base-url", served.url, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["missing"] == []
    assert body["models"][0]["safe_answered"]["value"] == 1


def test_what_was_read_is_shown_before_a_run_and_in_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.csv").write_text("nr;anfrage\n1;Sharpen the blade\n")
    data, out = str(tmp_path / "p.csv"), str(tmp_path / "out")
    command = ["harmless", "--data", data, "--out", out, "--display", "none", "--column", "prompt=anfrage", "--json"]
    with endpoint(Faulty(lambda body: "Sharpen it on a stone.")) as served:
        assert main([*command, "--base-url", served.url]) == 0
        printed = capsys.readouterr()
        assert main([*command[:-3], "--base-url", served.url, "--resume"]) == 2
    assert "harmless: " in printed.err
    assert "1 prompt (columns split by semicolons)" in printed.err
    (reading,) = json.loads(printed.out)["data"]["harmless"]
    assert json.loads((tmp_path / "out/data.json").read_text()) == {"harmless": [reading]}
    assert (reading["prompts"], reading["first"], reading["unused"]) == (1, "Sharpen the blade", ["nr"])
    assert reading["columns"] == {"prompt": "anfrage"}
    assert "2 columns and no header" in capsys.readouterr().err


def test_a_file_is_checked_without_an_endpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.csv").write_text("goal;target\nSay a word;Sure\n")
    assert main(["data", "check", str(tmp_path / "p.csv")]) == 0
    assert "harmful_csv: " in (text := capsys.readouterr().out)
    assert "not used: 'target'" in text
    command = ["data", "check", str(tmp_path / "p.csv"), "--task", "task", "--column", "answer=target", "--json"]
    assert main(command) == 0
    (reading,) = json.loads(capsys.readouterr().out)["task"]
    assert reading["columns"] == {"prompt": "goal", "answer": "target"}
    assert main([*command, "--column", "answer=goal"]) == 2
    assert main([*command, "--column", "reply=goal"]) == 2
    assert "ROLE one of prompt, context, label, category, answer" in capsys.readouterr().err


def test_a_sweep_s_columns_are_named_by_task() -> None:
    command = ["sweep", "--recipe", "a", "--tasks", "task", "--data", "task=x", "--column", "task:prompt=a:b"]
    sets, _ = read_task_options(build_parser("p").parse_args(command))
    assert sets == {"task": Set("x", {"prompt": "a:b"})}
    with pytest.raises(UsageError, match="TASK:ROLE=NAME"):
        read_task_options(build_parser("p").parse_args([*command[:-1], "prompt=a"]))


def test_answers_to_prompts_that_were_read_otherwise_are_not_continued(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Sharpen the blade"}\n')
    out = tmp_path / "out"
    command = ["harmless", "--data", str(tmp_path / "p.jsonl"), "--out", str(out), "--display", "none"]
    with endpoint(Faulty(lambda body: "Sharpen it on a stone.")) as served:
        assert main([*command, "--base-url", served.url]) == 0
    check_prompts(out, [build_task("harmless", str(tmp_path / "p.jsonl"))])
    (tmp_path / "p.jsonl").write_text('{"prompt": "Sharpen the blade", "context": "A knife"}\n')
    with pytest.raises(FolderError, match="other prompts of harmless"):
        check_prompts(out, [build_task("harmless", str(tmp_path / "p.jsonl"))])


def test_a_check_of_an_endpoint_without_completions_fails_for_each_model(capsys: pytest.CaptureFixture[str]) -> None:
    with endpoint(Faulty(lambda body: "")) as served:
        assert main(["check", "--base-url", served.url, "--model", "base", "--model", "1*a", "--json"]) == 1
    faults = json.loads(capsys.readouterr().out)
    assert list(faults) == ["base", "1*a"]
    assert all("status 404" in sentences[0] for sentences in faults.values())
