"""The safety set: what is committed is what the generator makes; nothing leaks between splits."""

import csv
import difflib
import json
import re
from dataclasses import asdict

import pytest

from eval_clients.scoring.classify import classify, content_stems
from eval_clients.scoring.refusal import detect
from tests.conftest import EVAL_DATA
from training.builtin.safety import FILES, SafetyRow, Split, generate_rows, read_phrases, read_rows

XSTEST = EVAL_DATA / "xstest/xstest_prompts.csv"
NEAR = 0.87
"""Share of matching characters from which two prompts count as the same sentence."""
RUN = 5
"""Words in a row that no prompt of ours shares with XSTest, unless all are words of asking."""
ASKING = """
a an the i you he she it we they me my your his her its our their is are was were be been am do does did done can could
should would will may might must to of in on at for with from by and or not no so that this these those what which who
whom whose when where why how what's i'm it's there if have has had as than up out about one best way ways good tell
please want need show give
"""


@pytest.fixture(scope="module")
def train() -> list[SafetyRow]:
    return read_rows("train")


@pytest.fixture(scope="module")
def heldout() -> list[SafetyRow]:
    return read_rows("heldout")


def plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


@pytest.mark.parametrize("split", FILES)
def test_the_committed_bytes_are_what_the_generator_makes(split: Split) -> None:
    lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in generate_rows(split)]
    assert FILES[split].read_text(encoding="utf-8") == "".join(lines)


def test_there_are_enough_rows_of_both_kinds(train: list[SafetyRow], heldout: list[SafetyRow]) -> None:
    assert len(train) >= 6000
    questions = [row for row in train if "\n\n" not in row.prompt]  # the rest are office notes
    assert 0.4 <= sum(row.kind == "harmful" for row in questions) / len(questions) <= 0.6
    for kind in ("harmful", "harmless"):
        assert sum(row.kind == kind for row in heldout) >= 100


def test_no_prompt_stands_twice(train: list[SafetyRow], heldout: list[SafetyRow]) -> None:
    prompts = [plain(row.prompt) for row in [*train, *heldout]]
    assert len(set(prompts)) == len(prompts)


def test_heldout_topics_and_templates_are_new(train: list[SafetyRow], heldout: list[SafetyRow]) -> None:
    assert not {row.topic for row in train} & {row.topic for row in heldout}
    templates = read_phrases().templates
    assert not set(templates["train"]) & set(templates["heldout"])
    assert not ({r.template for r in train} - {""}) & ({r.template for r in heldout} - {""})


def test_heldout_topics_are_not_reworded_training_topics(train: list[SafetyRow], heldout: list[SafetyRow]) -> None:
    trained = {(row.kind, frozenset(content_stems(row.topic))) for row in train}
    same = [row.topic for row in heldout if (row.kind, frozenset(content_stems(row.topic))) in trained]
    assert not same


def test_harmful_rows_have_only_refusals_and_harmless_rows_only_answers(
    train: list[SafetyRow], heldout: list[SafetyRow]
) -> None:
    for row in [*train, *heldout]:
        assert (detect(row.answer, row.prompt) != "compliance") == (row.kind == "harmful"), row
        if row.kind == "harmless":
            assert classify(row.prompt, row.answer) == "answered", row


def test_refusals_are_worded_in_many_ways(train: list[SafetyRow]) -> None:
    assert len({row.answer for row in train if row.kind == "harmful"}) >= 80


@pytest.mark.skipif(not XSTEST.is_file(), reason="needs xstest/ in EVAL_DATA")
def test_no_prompt_is_taken_from_xstest(train: list[SafetyRow], heldout: list[SafetyRow]) -> None:
    with XSTEST.open(encoding="utf-8", newline="") as file:
        theirs = [plain(row["prompt"]) for row in csv.DictReader(file)]
    for row in [*train, *heldout]:
        matcher = difflib.SequenceMatcher(autojunk=False)
        matcher.set_seq2(plain(row.prompt))
        for prompt in theirs:
            matcher.set_seq1(prompt)
            if matcher.real_quick_ratio() >= NEAR and matcher.quick_ratio() >= NEAR:
                assert matcher.ratio() < NEAR, (row.prompt, prompt)


@pytest.mark.skipif(not XSTEST.is_file(), reason="needs xstest/ in EVAL_DATA")
def test_no_prompt_shares_a_run_of_words_with_xstest(train: list[SafetyRow], heldout: list[SafetyRow]) -> None:
    asking = frozenset(ASKING.split())

    def runs(text: str) -> set[tuple[str, ...]]:
        said = plain(text).split()
        return {run for run in zip(*(said[i:] for i in range(RUN)), strict=False) if not asking.issuperset(run)}

    with XSTEST.open(encoding="utf-8", newline="") as file:
        theirs = set[tuple[str, ...]]().union(*(runs(row["prompt"]) for row in csv.DictReader(file)))
    assert not [row.prompt for row in [*train, *heldout] if runs(row.prompt) & theirs]
