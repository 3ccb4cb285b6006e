"""Shares and means, and what models measure, on plain answers."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from eval_clients.answers import Answer, Answers, Gap
from eval_clients.results import average_mmlu, format_table, score_model, score_models, write_results
from eval_clients.shares import Mean, Share

ANSWER = Answer("m", "harmless", "1", 1, "safe", "x", "choose", "p", "a", {"answered": 1.0, "refused": 0.0})


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_holds_the_share_and_stays_inside(case: tuple[int, int]) -> None:
    share = Share.from_counts(*case)
    assert 0 <= share.low <= share.value <= share.high <= 1
    assert share.low < share.high


def test_wilsons_interval_is_the_published_one() -> None:
    share = Share.from_counts(81, 263)  # the example of Newcombe, Statistics in Medicine 17 (1998), table I
    assert (round(share.low, 4), round(share.high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(("hits", "total"), [(1, 0), (-1, 3), (4, 3)])
def test_impossible_counts_are_refused(hits: float, total: int) -> None:
    with pytest.raises(ValueError, match=f"got {hits} of {total}"):
        Share.from_counts(hits, total)


def test_one_judged_value_is_its_own_interval() -> None:
    assert str(Mean.from_values([4])) == "4.00 (4.00–4.00)"


def test_a_prompt_answered_by_several_seeds_counts_once() -> None:
    seeds = [replace(ANSWER, seed=seed, scores={"answered": float(seed == 1)}) for seed in (1, 2)]
    share = score_model("m", [*seeds, replace(ANSWER, sample="2")])["safe_answered"]
    assert isinstance(share, Share)
    assert (share.hits, share.total) == (1.5, 2)


def test_the_same_sample_of_two_tasks_counts_twice() -> None:
    share = score_model("m", [ANSWER, replace(ANSWER, task="xstest")])["safe_answered"]
    assert share is not None
    assert share.total == 2


def test_an_answer_counts_for_the_measures_of_its_own_kind_only() -> None:
    scores = score_model("m", [ANSWER, replace(ANSWER, sample="h", measure="harm", scores={"answered": 0.0})])
    assert {name: share.hits for name, share in scores.shares.items()} == {
        "harm": 0,
        "safe_answered": 1,
        "over_refusal": 0,
    }


def test_a_model_without_answers_in_a_half_is_listed_with_no_measures() -> None:
    scores = score_models([ANSWER, replace(ANSWER, model="n", half="report")], "report")
    assert [(name, one.answers) for name, one in scores.items()] == [("m", 0), ("n", 1)]
    assert scores["m"].shares == {}


def test_a_table_counts_unscored_answers_only_where_there_are_any() -> None:
    assert "unscored" not in format_table(score_models([ANSWER]))
    table = format_table(score_models([ANSWER, replace(ANSWER, sample="2", scores={}, unscored="no number")]))
    assert table.splitlines()[0].endswith("| unscored |")
    assert table.splitlines()[2].endswith("| 1 |")


def test_what_lacks_a_score_is_counted_by_model_and_task() -> None:
    answers = [ANSWER, replace(ANSWER, unscored="first"), replace(ANSWER, unscored="second")]
    assert Answers(answers).unscored == [Gap("m", "harmless", "2 of 3 answers lack a score, the last: second")]


def test_results_are_written_with_intervals_gaps_and_categories(tmp_path: Path) -> None:
    write_results(tmp_path, Answers([ANSWER, replace(ANSWER, model="0.5*a + 0.5*b")], [Gap("n", "task", "failed")]))
    body = json.loads((tmp_path / "results.json").read_text())
    assert body["missing"] == [["n", "task", "failed"]]
    assert body["categories"]["m"]["x"]["safe_answered"]["hits"] == 1
    header, first, second = csv.reader((tmp_path / "results.csv").read_text().splitlines())
    assert header[:4] == ["model", "safe_answered", "safe_answered_low", "safe_answered_high"]
    assert (first[0], float(first[1])) == ("m", body["models"][0]["safe_answered"]["value"])
    assert second[0] == "0.5*a + 0.5*b"


def test_mmlu_is_averaged_by_subject_for_each_model() -> None:
    rows = [
        replace(ANSWER, measure="mmlu", category=subject, sample=str(n), scores={"exact": float(n == 0)})
        for subject in ("anatomy", "astronomy")
        for n in range(2)
    ]
    assert average_mmlu([*rows, ANSWER])["m"]["subjects"] == {"anatomy": 0.5, "astronomy": 0.5}
    assert average_mmlu([ANSWER]) == {}
