"""Votes of blind comparisons: how files are read, what is wrong with one, and how models are counted and ranked."""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from eval_clients.cli import main
from eval_clients.errors import DataError
from eval_clients.ranking import PRIOR, fit_strengths
from eval_clients.votes import MAX_LINE_BYTES, Vote, count_votes, read_votes

NUMBERS = itertools.count()


def pane(model: str, digest: str | None = None) -> dict[str, Any]:
    return {"model": model, "recipe": model if digest else None, "digest": digest, "answer": "Yes."}


def vote(a: dict[str, Any], b: dict[str, Any], choice: str) -> str:
    body = {"time": "2026-01-31T12:00:00.000Z", "seed": next(NUMBERS), "prompt": "Hi", "a": a, "b": b}
    return json.dumps(body | {"choice": choice})


def change(**keys: Any) -> str:
    """A vote with other values of these keys."""
    return json.dumps(json.loads(GOOD) | keys)


GOOD = vote(pane("x"), pane("y"), "a")


def write(folder: Path, *lines: str) -> Path:
    path = folder / "votes.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_wins_losses_and_ties_are_counted_by_digest(tmp_path: Path) -> None:
    mix, same, base = pane("0.6*a + 0.4*b", "d1"), pane("0.4*b + 0.6*a", "d1"), pane("base")
    path = write(tmp_path, vote(mix, base, "a"), vote(base, same, "b"), vote(base, mix, "tie"), vote(mix, base, "b"))
    tally = count_votes(*read_votes([path]))
    assert [(one.label, one.wins, one.losses, one.ties) for one in tally.records] == [
        ("0.6*a + 0.4*b", 2, 1, 1),
        ("base", 1, 2, 1),
    ]
    first = tally.records[0].share
    assert (first.hits, first.total) == (2.5, 4)
    assert first.low < 2.5 / 4 < first.high
    assert (tally.first.hits, tally.votes) == (1.5, 4)


def test_a_vote_in_two_files_counts_once(tmp_path: Path) -> None:
    lines = [vote(pane("x"), pane("y"), "a"), vote(pane("x"), pane("y"), "a")]
    first = write(tmp_path, lines[0])
    (tmp_path / "later").mkdir()
    both = write(tmp_path / "later", *lines)
    tally = count_votes(*read_votes([first, both]))
    assert (tally.votes, tally.repeats, tally.records[0].wins) == (2, 1, 2)


def test_strengths_are_those_the_votes_were_drawn_with() -> None:
    truth = {"a": 1.2, "b": 0.1, "c": -1.3}
    draw, votes = random.Random(5), []
    for left, right in itertools.permutations(truth, 2):
        for _ in range(2000):
            won = draw.random() < 1 / (1 + math.exp(truth[right] - truth[left]))
            votes.append(Vote(left, right, "a" if won else "b", (left, right)))
    tally = count_votes(votes)
    assert [one.label for one in tally.records] == ["a", "b", "c"]
    found = {one.label: one.strength for one in tally.records}
    for one, other in itertools.combinations(truth, 2):
        assert found[one] - found[other] == pytest.approx(truth[one] - truth[other], abs=0.12)


def test_strengths_are_where_the_likelihood_is_flat_and_finite_for_one_that_never_lost() -> None:
    points = {("a", "b"): 5.0, ("b", "a"): 0.0, ("b", "c"): 2.5, ("c", "b"): 0.5, ("d", "e"): 1.0}
    strengths = fit_strengths(points)
    for one in strengths:
        slope = PRIOR - 2 * PRIOR / (1 + math.exp(-strengths[one]))
        for other in strengths.keys() - {one}:
            won, lost = points.get((one, other), 0.0), points.get((other, one), 0.0)
            slope += won - (won + lost) / (1 + math.exp(strengths[other] - strengths[one]))
        assert slope == pytest.approx(0, abs=1e-6)
    assert strengths["d"] == pytest.approx(-strengths["e"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "votes.jsonl:2: not valid JSON"),
        ("[" * 100_000, "votes.jsonl:2: not valid JSON"),
        ("[]", "votes.jsonl:2: expected a JSON object, got list"),
        (vote(pane("x"), pane("y"), "c"), "votes.jsonl:2: 'choice' must be 'a', 'b' or 'tie', got 'c'"),
        (change(choice=["a"]), "'choice' must be"),
        (change(time="noon"), "'time' must be an ISO 8601 time, got 'noon'"),
        (change(seed=True), "'seed' must be a whole number, got True"),
        (change(prompt=None), "'prompt' must be text, got None"),
        (change(b="y"), "'b' must be an object with 'model' and 'answer', got 'y'"),
        (vote(pane("x"), {"model": "y"}, "a"), "'b.answer' must be text, got None"),
        (vote(pane("x") | {"digest": 1}, pane("y"), "a"), "'a.digest' must be text or null, got 1"),
        (vote(pane("x"), pane("x"), "a"), "both panes are 'x'"),
        ("x" * (MAX_LINE_BYTES + 1), f"the line has more than {MAX_LINE_BYTES} bytes"),
    ],
)
def test_a_line_that_is_no_vote_is_named_with_its_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    path = write(tmp_path, GOOD, line)
    assert main(["votes", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_a_file_without_votes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hold no votes"):
        read_votes([write(tmp_path, "", " ")])
    assert main(["votes", str(tmp_path / "missing.jsonl")]) == 2


def test_votes_are_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, GOOD, vote(pane("y"), pane("x"), "tie"))
    assert main(["votes", str(path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| model | votes | wins | losses | ties | won, ties as half | strength |"
    assert table[2].startswith("| `x` | 2 | 1 | 0 | 1 | 75 % (")
    assert table[-1].startswith("2 votes; the first answer won 75 % (")
    assert main(["votes", "--json", str(path)]) == 0
    body = json.loads(capsys.readouterr().out)
    assert [(one["model"], one["wins"], one["votes"]) for one in body["models"]] == [("x", 1, 2), ("y", 0, 2)]
    assert body["models"][0]["share"]["value"] == 0.75
