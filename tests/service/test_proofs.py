"""What the long proofs judge by: which answers are the same, what a profile may have said, and what a seed draws."""

import json
import random
from pathlib import Path

import pytest

from tests.service import proofs
from tests.service.churn import FORMS, TOLERANCE, Answer, History, Version, make_subjects
from tests.service.tiny import draw_prompt

ANSWER = Answer((5, 6), (-1.0, -2.0), "d")


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (Answer((5, 6), (-1.0 + TOLERANCE / 2, -2.0), "d"), False),
        (Answer((5, 6), (-1.0, -2.0 - 2 * TOLERANCE), "d"), True),
        (Answer((7, 6), (-1.0, -9.0), "d"), False),  # two tokens as likely: what follows says nothing
        (Answer((7, 6), (-1.1, -2.0), "d"), True),
        (Answer((5, 8), (-1.0, -2.5), "d"), True),
    ],
)
def test_answers_differ_by_their_numbers_until_they_part(other: Answer, differs: bool) -> None:
    assert ANSWER.differs(other) == other.differs(ANSWER) == differs


def test_a_profile_may_answer_as_whatever_was_current_or_under_way() -> None:
    history = History([Version(1, 0, 1), Version(2, 10, 11), Version(3, 20), Version(4, 30, 31)])
    assert history.between(2, 3) == {1}
    assert history.between(10.5, 10.6) == {1, 2}
    assert history.between(12, 13) == {2}
    assert history.between(21, 22) == {2, 3}, "nobody knows whether what was not acknowledged has happened"
    assert history.between(32, 33) == {4}
    assert History().between(0, 1) == set()


def test_a_seed_draws_the_same_recipes_of_every_form() -> None:
    first, again = (make_subjects(random.Random(7), 3 * len(FORMS), draw_prompt) for _ in range(2))
    assert first == again
    assert {subject.form for subject in first} == FORMS.keys()
    assert len({str(subject.recipe) for subject in first}) == len(first)


def test_a_short_run_is_recorded_where_there_is_no_long_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "RESULT", tmp_path / "result.json")
    for is_short, count in ((True, 1), (True, 2), (False, 3), (True, 4)):
        monkeypatch.setattr(proofs, "IS_SHORT", is_short)
        proofs.record("part", "test_part.py", {"count": count})
        kept = json.loads((tmp_path / "result.json").read_text())["part"]
        assert kept["count"] == min(count, 3)
        assert kept["command"].startswith(f"SOAK_SEED={proofs.SEED} ")
