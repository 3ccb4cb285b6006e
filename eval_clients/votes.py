"""Votes of the page's blind comparison: read their JSONL files, count them, and rank the models.

A line is one vote, a JSON object: `time`, `seed` (of the order of the answers), `prompt`, `choice` (`a`, `b` or `tie`),
and under `a` and `b`, the first answer and the second, `model`, `recipe`, `digest` and `answer`. Fusions are told apart
by their digests, whatever their recipes' spelling; models without one by their names.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from eval_clients.errors import DataError
from eval_clients.ranking import fit_strengths
from eval_clients.shares import Share

Choice = Literal["a", "b", "tie"]
MAX_LINE_BYTES = 2**20
MAX_VOTES = 100_000
MAX_MODELS = 500
VOTES_HELP = "count the votes of blind comparisons, and rank the models"


@dataclass(frozen=True, slots=True)
class Vote:
    """One vote between what answered first in the order on the page (`a`) and second (`b`)."""

    a: str
    b: str
    choice: Choice
    labels: tuple[str, str]
    """What people call both: the recipe, or else the name."""


@dataclass(frozen=True, slots=True)
class Record:
    """The votes on one model. `share` counts a tie as half a win; `strength` is Bradley and Terry's (see `ranking`)."""

    model: str
    label: str
    wins: int
    losses: int
    ties: int
    share: Share
    strength: float

    @property
    def votes(self) -> int:
        """All of them."""
        return self.wins + self.losses + self.ties


@dataclass(frozen=True, slots=True)
class Tally:
    """All votes: the models, strongest first, and how often the first answer was chosen, a tie being half."""

    records: Sequence[Record]
    first: Share
    votes: int
    repeats: int
    """Votes that stood there before, in the same file or another, and count once."""

    def to_json(self) -> dict[str, Any]:
        """Everything, with the shares' values."""
        models = [asdict(one) | {"votes": one.votes, "share": _show(one.share)} for one in self.records]
        return {"votes": self.votes, "repeats": self.repeats, "first": _show(self.first), "models": models}


def _show(share: Share) -> dict[str, float]:
    return {"value": share.value, **asdict(share)}


def read_votes(paths: Iterable[Path]) -> tuple[list[Vote], int]:
    """The votes in JSONL files and how many are repeated; DataError says in which line something is wrong."""
    votes: dict[str, Vote] = {}
    count = 0
    for path in paths:
        for place, line in _read_lines(path):
            vote, identity = _parse(line, place)
            votes.setdefault(identity, vote)
            count += 1
            if len(votes) > MAX_VOTES:
                raise DataError(f"{place}: more than {MAX_VOTES} votes; give fewer files")
    if not votes:
        raise DataError("the files hold no votes; the page's tab 'Blind vote' exports some")
    if len(models := {name for vote in votes.values() for name in (vote.a, vote.b)}) > MAX_MODELS:
        raise DataError(f"the votes are about {len(models)} models; expected at most {MAX_MODELS}")
    return list(votes.values()), count - len(votes)


def _read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{path}:{number}: the line has more than {MAX_LINE_BYTES} bytes; expected one vote")
            if line.strip():
                yield f"{path}:{number}", line


def _parse(line: bytes, place: str) -> tuple[Vote, str]:
    """The vote in a line, and what tells it from others."""
    body: Any
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON ({error}); expected one vote a line") from None
    if not isinstance(body, dict):
        raise DataError(f"{place}: expected a JSON object, got {type(body).__name__}")
    choice: Any = body.get("choice")
    if choice not in get_args(Choice):
        raise DataError(f"{place}: 'choice' must be 'a', 'b' or 'tie', got {choice!r:.60}")
    time = body.get("time")
    try:
        datetime.fromisoformat(time if isinstance(time, str) else "")
    except ValueError:
        raise DataError(f"{place}: 'time' must be an ISO 8601 time, got {time!r:.60}") from None
    for key, kind, what in (("seed", int, "a whole number"), ("prompt", str, "text")):
        if not isinstance(body.get(key), kind) or isinstance(body[key], bool):
            raise DataError(f"{place}: {key!r} must be {what}, got {body.get(key)!r:.60}")
    (a, left), (b, right) = (_read_pane(body.get(pane), pane, place) for pane in ("a", "b"))
    if a == b:
        raise DataError(f"{place}: both panes are {left!r:.100}; a vote is between two different models")
    return Vote(a, b, choice, (left, right)), json.dumps(body, sort_keys=True)


def _read_pane(pane: Any, name: str, place: str) -> tuple[str, str]:
    """What identifies the model of a pane, and its label."""
    if not isinstance(pane, dict):
        raise DataError(f"{place}: {name!r} must be an object with 'model' and 'answer', got {pane!r:.60}")
    for key in ("model", "answer"):
        if not isinstance(pane.get(key), str):
            raise DataError(f"{place}: '{name}.{key}' must be text, got {pane.get(key)!r:.60}")
    for key in ("recipe", "digest"):
        if not isinstance(pane.get(key), str | None):
            raise DataError(f"{place}: '{name}.{key}' must be text or null, got {pane[key]!r:.60}")
    return pane.get("digest") or pane["model"], pane.get("recipe") or pane["model"]


def count_votes(votes: Sequence[Vote], repeats: int = 0) -> Tally:
    """Wins, losses, ties and strength of each model."""
    points: dict[tuple[str, str], float] = defaultdict(float)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    labels: dict[str, str] = {}
    for vote in votes:
        a_point = {"a": 1.0, "b": 0.0, "tie": 0.5}[vote.choice]
        points[vote.a, vote.b] += a_point
        points[vote.b, vote.a] += 1 - a_point
        for model, label, point in ((vote.a, vote.labels[0], a_point), (vote.b, vote.labels[1], 1 - a_point)):
            labels.setdefault(model, label)
            counts[model][{1.0: "wins", 0.0: "losses"}.get(point, "ties")] += 1
    strengths = fit_strengths(points)
    records = []
    for model, count in counts.items():
        wins, losses, ties = (count[name] for name in ("wins", "losses", "ties"))
        share = Share.from_counts(wins + ties / 2, wins + losses + ties)
        records.append(Record(model, labels[model], wins, losses, ties, share, strengths[model]))
    first = sum({"a": 1.0, "b": 0.0, "tie": 0.5}[vote.choice] for vote in votes)
    records.sort(key=lambda one: (-one.strength, one.label))
    return Tally(records, Share.from_counts(first, len(votes)), len(votes), repeats)


def format_tally(tally: Tally) -> str:
    """Markdown: one model a row, strongest first."""
    lines = ["| model | votes | wins | losses | ties | won, ties as half | strength |", "| --- " * 7 + "|"]
    for one in tally.records:
        numbers = f"{one.votes} | {one.wins} | {one.losses} | {one.ties} | {one.share} | {one.strength:+.2f}"
        lines.append(f"| `{one.label}` | {numbers} |")
    repeats = f"; {tally.repeats} repeated ones left out" if tally.repeats else ""
    return "\n".join([*lines, "", f"{tally.votes} votes{repeats}; the first answer won {tally.first}, ties as half"])


def add_votes(parser: argparse.ArgumentParser) -> None:
    """Add the options of `votes`."""
    parser.description = f"{VOTES_HELP.capitalize()}; asks no server."
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSONL, as the page exports it")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run_votes(args: argparse.Namespace) -> int:
    """Print the result of the votes; DataError when a file cannot be read."""
    tally = count_votes(*read_votes(args.files))
    print(json.dumps(tally.to_json(), indent=1, ensure_ascii=False) if args.json else format_tally(tally))
    return 0
