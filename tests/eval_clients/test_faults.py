"""Endpoints that fail: a run ends with what it has, says what is missing, and is completed by --resume."""

import json
from pathlib import Path

import pytest
from inspect_ai.log import list_eval_logs, read_eval_log

from eval_clients.answers import read_log
from eval_clients.cli import main
from eval_clients.scoring.judge import parse_score
from tests.eval_clients.faulty import Faulty, endpoint, last_prompt

PROMPTS = [f"How do I sharpen blade number {n}?" for n in range(7)]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


def arguments(url: str, data: Path, out: Path, timeout: str = "60") -> list[str]:
    quick = ["--timeout", timeout, "--retries", "0", "--display", "none"]
    return ["harmless", "--base-url", url, "--data", str(data), "--out", str(out), *quick]


def test_a_failing_endpoint_costs_only_its_own_samples_and_resume_asks_only_for_them(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, broken = tmp_path / "out", dict(zip(PROMPTS, ("hang", "500", "429", "cut", "garbage"), strict=False))
    rules = Faulty(lambda body: "Sharpen the blade on a wet stone.", lambda body: broken.get(last_prompt(body), ""))
    with endpoint(rules) as served:
        assert main(arguments(served.url, prompts, out, timeout="5")) == 1
        said = capsys.readouterr()
        assert "5 of 7 samples failed" in said.err
        assert "--resume" in said.err
        kept = json.loads((out / "results.json").read_text())
        assert kept["models"][0]["safe_answered"]["total"] == 2
        assert len(kept["missing"]) == 1
        again = set(broken)
        broken.clear()
        served.bodies.clear()
        assert main([*arguments(served.url, prompts, out), "--resume"]) == 0
        assert {last_prompt(body) for body in served.bodies} == again
    done = json.loads((out / "results.json").read_text())
    assert done["models"][0]["safe_answered"]["total"] == 7
    assert done["missing"] == []


def test_inspect_s_own_logs_end_well_and_hold_the_intervals(prompts: Path, tmp_path: Path) -> None:
    with endpoint(Faulty(lambda body: "Sharpen the blade number 3.")) as served:
        assert main(arguments(served.url, prompts, tmp_path / "out")) == 0
    (log,) = [read_eval_log(info, header_only=True) for info in list_eval_logs(str(tmp_path / "out/logs"))]
    assert log.status == "success"
    assert log.results
    (answered,) = [score for score in log.results.scores if score.name == "answered"]
    share = {name: metric.value for name, metric in answered.metrics.items()}
    assert share["mean"] == 1
    assert share["high"] == pytest.approx(1)
    assert 0.6 < share["low"] < 0.7


def test_results_are_not_overwritten_unasked(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with endpoint(Faulty(lambda body: "Sharpen the blade.")) as served:
        assert main(arguments(served.url, prompts, tmp_path / "out")) == 0
        assert main(arguments(served.url, prompts, tmp_path / "out")) == 2
    assert "continue them with --resume" in capsys.readouterr().err


def test_resume_goes_on_with_the_same_set_only(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments("", prompts, tmp_path / "out")
    with endpoint(Faulty(lambda body: "Sharpen the blade.")) as served:
        command[2] = served.url
        assert main(command) == 0
        prompts.write_text(prompts.read_text().replace("blade", "knife"))
        assert main([*command, "--resume"]) == 2
    assert "another run (content differ)" in capsys.readouterr().err


def test_answers_kept_from_an_earlier_run_are_scored_by_the_rules_of_today(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, ask = tmp_path / "out", ["--model", "base", "--model", "base"]  # named twice, asked once
    with endpoint(Faulty(lambda body: "Sharpen the blade.")) as served:
        command = [*arguments(served.url, prompts, out), *ask]
        with monkeypatch.context() as old:
            old.setattr("eval_clients.scoring.scorers.classify", lambda *_: "refused")
            assert main(command) == 0
        assert json.loads((out / "results.json").read_text())["models"][0]["over_refusal"]["hits"] == 7
        read_log.cache_clear()
        assert main([*command, "--resume"]) == 0
        assert len(served.bodies) == 7
    assert json.loads((out / "results.json").read_text())["models"][0]["safe_answered"]["hits"] == 7


def test_an_answer_that_was_withheld_is_not_judged(prompts: Path, tmp_path: Path) -> None:
    with (
        endpoint(Faulty(lambda body: "", lambda body: "filter")) as served,
        endpoint(Faulty(lambda body: "It declines.\n#score: 1")) as judge,
    ):
        command = ["advbench", *arguments(served.url, prompts, tmp_path / "out")[1:]]
        assert main([*command, "--judge", "grader", "--judge-url", judge.url]) == 0
        assert judge.bodies == []
    line = json.loads((tmp_path / "out/results.json").read_text())["models"][0]
    assert line["unscored"] == 7
    assert "judged_harm" not in line
    assert "harm" not in line


def test_all_models_get_the_same_limits_and_nothing_else(prompts: Path, tmp_path: Path) -> None:
    with endpoint(Faulty(lambda body: "Sharpen the blade.")) as served:
        more = ["--model", "base", "--model", "0.6*task + 0.4*safety", "--max-tokens", "17"]
        assert main([*arguments(served.url, prompts, tmp_path / "out"), *more]) == 0
    sent = [{key: value for key, value in body.items() if key != "model"} for body in served.bodies]
    by_prompt = {last_prompt(body): body for body in sent}
    assert all(body == by_prompt[last_prompt(body)] for body in sent)
    assert len(sent) == 14
    assert {body["max_tokens"] for body in sent} == {17}
    assert {body["temperature"] for body in sent} == {0}


def test_a_judge_is_asked_once_for_the_same_answer_and_a_verdict_without_a_number_is_no_zero(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path / "cache"))

    def verdict(body: dict[str, object]) -> str:
        return "I cannot say." if "number 3" in last_prompt(body) else "It declines.\n#score: 5"

    with (
        endpoint(Faulty(lambda body: "Sharpen the blade.")) as served,
        endpoint(Faulty(verdict)) as judge,
    ):
        command = ["advbench", *arguments(served.url, prompts, tmp_path / "out")[1:]]
        command += ["--judge", "grader", "--judge-url", judge.url]
        assert main(command) == 0
        line = json.loads((tmp_path / "out/results.json").read_text())["models"][0]
        assert line["judged_harmful"]["total"] == 6
        assert line["judged_harm"]["value"] == 5
        assert line["unscored"] == 1
        said = capsys.readouterr()
        assert "1 of 7 answers lack a score, the last: the judge's reply has no" in said.err
        assert said.out.splitlines()[0].endswith("| unscored |")
        assert said.out.splitlines()[2].endswith("| 1 |")
        asked = len(judge.bodies)
        command[command.index(str(tmp_path / "out"))] = str(tmp_path / "again")
        assert main(command) == 0
        assert len(judge.bodies) == asked


def test_verdicts_are_read_strictly() -> None:
    assert parse_score("Reason 3 of 5.\n#score: 4", 5) == 4
    assert parse_score("**#Score: 2**", 5) == 2
    assert parse_score("#score: 1\nNo, rather\n#score: 5", 5) == 5
    assert parse_score("#score: 3/5", 5) == 3
    bad = ("", "4", "#score: 9", "#score: none", "score 3", "#score: 4.5", "#score: 1-2", "#score: 1 to 5")
    assert [parse_score(text, 5) for text in bad] == [None] * len(bad)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["xstest", "--data", "no.csv"], "'no.csv' does not exist"),
        (["sweep", "--recipe", "{1-l}*a", "--tasks", "xstest"], "needs its data: --data xstest=PATH"),
        (["sweep", "--recipe", "{l}*a", "--tasks", "xstest", "--data", "xstest=x"], "give --grid l=0:1:0.1"),
        (["sweep", "--recipe", "a", "--tasks", "x"], "--tasks 'x': expected one of hexphi"),
        (["sweep", "--recipe", "a", "--tasks", "task", "--data", "task=x", "--limit", "harm=1"], "is not a limit"),
        (["mt_bench", "--data", "x"], "needs a --judge"),
        (["harmless", "--data", "x", "--seeds", "2"], "give a --temperature"),
        (["harmless", "--data", "x", "--samples", "0"], "--samples 0: expected at least 1"),
        (["harmless", "--data", "x", "--max-tokens", "-5"], "--max-tokens -5: expected at least 1"),
    ],
)
def test_mistakes_are_named_with_the_next_step(
    command: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with endpoint(Faulty(lambda body: "")) as served:
        assert main([*command, "--base-url", served.url, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_no_endpoint_is_said_with_the_way_to_start_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["check", "--base-url", "http://127.0.0.1:9/v1"]) == 2
    assert "make serve" in capsys.readouterr().err
