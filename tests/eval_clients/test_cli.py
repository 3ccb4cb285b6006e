"""The command line: what it lists, and what decides whether a run may be resumed."""

import json
from pathlib import Path

import pytest

from eval_clients.cli import build_parser, identify_run, main
from eval_clients.tasks.benchmarks import BENCHMARKS
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


def test_a_check_of_an_endpoint_without_completions_fails_for_each_model(capsys: pytest.CaptureFixture[str]) -> None:
    with endpoint(Faulty(lambda body: "")) as served:
        assert main(["check", "--base-url", served.url, "--model", "base", "--model", "1*a", "--json"]) == 1
    faults = json.loads(capsys.readouterr().out)
    assert list(faults) == ["base", "1*a"]
    assert all("status 404" in sentences[0] for sentences in faults.values())
