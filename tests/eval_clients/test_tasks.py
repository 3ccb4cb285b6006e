"""The benchmarks as tasks: what they ask, and the names that logs record."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from inspect_ai import Task

from eval_clients.tasks.benchmarks import BENCHMARKS, build_task


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, str]:
    """A small set for every benchmark, by its name."""
    rows = [{"prompt": f"prompt {n}", "answer": {"n": n}} for n in range(6)]
    kinds = ("safe", "unsafe")
    xstest = [f"{n},prompt {n},kind,{kinds[n % 2]}" for n in range(8)]
    turns = {"question_id": 1, "category": "math", "turns": ["first", "second"]}
    files = {
        "rows.jsonl": "\n".join(map(json.dumps, rows)),
        "xstest.csv": "\n".join(["id,prompt,type,label", *xstest]),
        "hexphi/category_1.csv": "prompt one\nprompt two",
        "mmlu/dev/astronomy_dev.csv": "q,1,2,3,4,A",
        "mmlu/test/astronomy_test.csv": "q,1,2,3,4,B",
        "mt/question.jsonl": json.dumps(turns),
        "mt/reference_answer.jsonl": json.dumps({"question_id": 1, "choices": [{"turns": ["one", "two"]}]}),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    own = {"hexphi": "hexphi", "mmlu": "mmlu", "mt_bench": "mt", "xstest": "xstest.csv"}
    return {name: str(tmp_path / own.get(name, "rows.jsonl")) for name in BENCHMARKS}


def scorers(task: Task) -> list[str]:
    listed: list[Any] = task.scorer if isinstance(task.scorer, list) else [task.scorer]
    return [scorer.__name__ if hasattr(scorer, "__name__") else str(scorer) for scorer in listed]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_sample_says_what_it_measures_and_which_half_it_is_of(name: str, sets: dict[str, str]) -> None:
    task = build_task(name, sets[name])
    assert task.name == name
    for sample in task.dataset:
        assert sample.metadata is not None
        assert sample.metadata["measure"] in ("harm", "safe", "task", "mmlu", "dialogue", "prefill")
        assert sample.metadata["half"] in ("choose", "report")


def test_the_parameters_that_logs_record_stay() -> None:
    """A resumed run finds its answers by the task's name and arguments."""
    parameters = {name: list(inspect.signature(one.create).parameters) for name, one in BENCHMARKS.items()}
    answers = ["path", "limit", "max_tokens", "temperature"]
    assert parameters == {
        "hexphi": [*answers, "judged"],
        "advbench": [*answers, "judged"],
        "harmful_csv": [*answers, "judged"],
        "harmless": answers,
        "xstest": answers,
        "mmlu": ["path", "limit"],
        "mt_bench": answers,
        "prefill": [*answers, "judged", "openings"],
        "task": [*answers, "judged"],
    }


def test_answers_have_the_length_of_their_benchmark_unless_one_is_given(sets: dict[str, str]) -> None:
    longest = {name: build_task(name, sets[name]).config.max_tokens for name in ("xstest", "task", "mt_bench")}
    assert longest == {"xstest": 64, "task": 96, "mt_bench": 512}
    assert build_task("task", sets["task"], max_tokens=7).config.max_tokens == 7


def test_options_that_mmlu_does_not_take_are_left_out(sets: dict[str, str]) -> None:
    task = build_task("mmlu", sets["mmlu"], samples=1, max_tokens=7, temperature=1.0, judged=True)
    assert task.config.max_tokens is None
    assert len(task.dataset) == 1


@pytest.mark.parametrize("name", ["hexphi", "advbench", "harmful_csv", "task"])
def test_a_judge_adds_a_scorer_and_takes_none_away(name: str, sets: dict[str, str]) -> None:
    counts = [len(scorers(build_task(name, sets[name], judged=judged))) for judged in (False, True)]
    assert counts == [1, 2]


def test_a_limit_on_xstest_is_for_each_of_its_kinds(sets: dict[str, str]) -> None:
    measures = [
        (sample.metadata or {})["measure"] for sample in build_task("xstest", sets["xstest"], samples=3).dataset
    ]
    assert sorted(measures) == ["harm"] * 3 + ["safe"] * 3


def test_mt_bench_shows_a_reference_where_the_category_has_one(sets: dict[str, str]) -> None:
    (sample,) = build_task("mt_bench", sets["mt_bench"]).dataset
    assert sample.metadata is not None
    assert sample.metadata["references"] == ["one", "two"]
    assert sample.metadata["second"] == "second"
