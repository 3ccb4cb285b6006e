"""What a row's tags say of its answer: whether it is one to learn.

KTO's rows have such a tag, and so has what people and other models have judged. Booleans and words are taken at their
word. Whether 0 means bad is known once the column was read: a column of 0 and 1 judges, one of 0, 1 and 2 sorts.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from training.rows.formats import normalize
from training.rows.values import has_value, shorten

_BOOL, _WORD, _ANSWER, _FEEDBACK, _BIT, _ZERO, _MARK = "bool", "word", "answer", "feedback", "bit", "zero", "mark"
_TAG = frozenset({_BOOL, _WORD, _BIT})
_OPINION = frozenset({_WORD, _FEEDBACK})
_KINDS: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("label", "ktotag", "kto"), _TAG),
    **dict.fromkeys(("chosen", "accepted", "approved", "preferred", "desirable", "acceptable"), _TAG | {_ANSWER}),
    **dict.fromkeys(("good", "rejected", "undesirable"), _TAG | {_ANSWER}),
    **dict.fromkeys(("correct", "incorrect", "wrong", "bad"), frozenset({_BOOL, _WORD, _ANSWER})),
    **dict.fromkeys(("thumbsup", "thumbup", "liked", "upvoted"), frozenset({_BOOL, _ANSWER})),
    **dict.fromkeys(("thumbsdown", "thumbdown", "disliked", "downvoted"), frozenset({_BOOL, _ANSWER})),
    **dict.fromkeys(("thumbs", "thumb", "feedback", "vote", "rating"), _TAG | {_FEEDBACK, _MARK}),
    **dict.fromkeys(("verdict", "preference", "reaction", "status", "judgment"), _OPINION),
    **dict.fromkeys(("train", "trainable"), frozenset({_BOOL, _BIT})),
    "weight": frozenset({_BOOL, _ZERO, _MARK}),
    **dict.fromkeys(("score", "reward"), frozenset({_BIT, _MARK})),
    **dict.fromkeys(("quality", "grade", "stars", "upvotes", "votes", "rank"), frozenset({_MARK})),
    **dict.fromkeys(("helpfulness", "correctness", "safe", "harmful", "unsafe", "toxicity"), frozenset({_MARK})),
}
"""What columns judge an answer, with or without `is` before their names, and what in them does: booleans, words, yes
and no, words of feedback, 1 and 0, or 0 by itself. Other numbers in them are a mark; so is anything in those of the
last two lines, which may judge the question as well.
"""
_ONE_SIDED = ("up", "liked", "upvoted", "down", "disliked", "downvoted")
"""Endings of names of columns in which no may mean that nobody has said anything."""
_INVERTED = ("rejected", "undesirable", "incorrect", "wrong", "bad", "down", "disliked", "downvoted")
"""Endings of names of columns that say yes to a bad answer."""
_BAD = ("rejected", "reject", "bad", "wrong", "incorrect", "undesirable", "unacceptable", "notaccepted", "notchosen")
_GOOD = ("chosen", "accepted", "accept", "approved", "good", "correct", "desirable", "acceptable", "preferred")
_WORDS: Mapping[str, Mapping[str, bool]] = {
    _BOOL: {"true": True, "false": False},
    _WORD: dict.fromkeys(_GOOD, True) | dict.fromkeys(_BAD, False),
    _ZERO: {"0": False, "0.0": False},
    _ANSWER: {"yes": True, "y": True, "no": False, "n": False},
    _FEEDBACK: dict.fromkeys(("positive", "up", "thumbsup", "thumbup", "like", "liked", "upvote", "👍"), True)
    | dict.fromkeys(("negative", "down", "thumbsdown", "thumbdown", "dislike", "disliked", "downvote", "👎"), False),
}
_NUMBERS, _MANY, _TEXT = ("-1", "0", "1"), "other numbers", "text"
_HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval", "evaluation", "heldout")
_ALL = frozenset({_BOOL, _WORD, _ANSWER, _FEEDBACK, _BIT})


class RejectedRowError(ValueError):
    """A row says that its answer is a bad one."""


def squeeze(text: object) -> str:
    """A name or a word for comparison: case, spaces, hyphens and underscores do not matter."""
    return normalize(str(text).strip()).replace("_", "").replace("-", "")


@lru_cache(maxsize=256)
def find_tags(columns: tuple[str, ...]) -> tuple[str, ...]:
    """Those columns that judge the answer by their names, or may."""
    return tuple(column for column in columns if _find_kinds(column))


def judge(column: str, value: object, answer: object = None, *, is_named: bool = False) -> bool | None:
    """Whether the answer is one to learn, None where the value does not say so by itself. A label that is the answer
    sorts the prompt. `is_named`: the user says that the column judges.

    ValueError for a value that a column which judges cannot have.
    """
    word = squeeze(value)
    if isinstance(value, str) and isinstance(answer, str) and word == squeeze(answer):
        return None
    found = _find_word(column, word, is_named=is_named)
    if found is not None and word in {**_WORDS[_BOOL], **_WORDS[_ANSWER]}:  # yes or no to the column's name
        name = squeeze(column)
        return None if not found and name.endswith(_ONE_SIDED) else found != name.endswith(_INVERTED)
    if found is None and is_named and has_value(value) and _read_number(value) not in _NUMBERS:
        raise ValueError(f"{column} is {shorten(value)}: expected true or false, 1 or 0, chosen or rejected")
    return found


def reject(column: str, value: object) -> RejectedRowError:
    """The reason for leaving a row out."""
    shown = str(value).lower() if isinstance(value, bool) else shorten(value) if isinstance(value, str) else value
    return RejectedRowError(f"{column} is {shown}: its answer is not one to learn")


@dataclass(slots=True)
class Numbers:
    """The numbers in the columns of a source that may judge."""

    is_named: bool = False
    """Whether the user says that they do."""
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """By column, how often it has each of _NUMBERS, other numbers (MANY) and text (TEXT)."""
    places: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """By column and number, the indices of the rows."""

    def add(self, row: Mapping[str, object], columns: Iterable[str], index: int) -> None:
        """Note the row of this index."""
        for column in columns:
            if has_value(row[column]) and _find_word(column, squeeze(row[column]), is_named=self.is_named) is None:
                number = _read_number(row[column])
                self.counts.setdefault(column, Counter())[number] += 1
                if number in _NUMBERS:
                    self.places.setdefault(column, {}).setdefault(number, []).append(index)

    def list_rejected(self) -> Iterator[tuple[str, str, list[int]]]:
        """(column, number, indices) of the rows that a column of 0 and 1, or of -1 and 1, rejects."""
        for column, counts in self.counts.items():
            kinds = _find_kinds(column)
            is_bit = _BIT in kinds and (counts["1"] > 0 or _MARK not in kinds)  # zeros alone are no low marks
            if (self.is_named or is_bit) and not counts[_MANY] + counts[_TEXT]:
                bad = "1" if squeeze(column).endswith(_INVERTED) else "-1" if counts["-1"] else "0"
                if counts[bad]:
                    yield column, bad, self.places[column][bad]

    def list_marks(self) -> list[str]:
        """The columns of other numbers that may rate the answers."""
        return [
            column
            for column, counts in self.counts.items()
            if not counts[_TEXT]
            and (_find_kinds(column) == {_MARK} or (counts[_MANY] and _MARK in _find_kinds(column)))
        ]


@dataclass(slots=True)
class Splits:
    """How many rows of a source say that they are for something else than training."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, row: Mapping[str, object]) -> None:
        """Note what the row says."""
        for column in ("split", "Split"):
            if squeeze(row.get(column)) in _HELD_OUT:
                self.counts[column, str(row[column])[:40]] += 1

    def describe(self) -> list[str]:
        """A sentence about each such split."""
        return [
            f"{column!r} is {value!r} in {count} rows, which are learned like the others: leave them out"
            for (column, value), count in self.counts.items()
        ]


def _find_word(column: str, word: str, *, is_named: bool) -> bool | None:
    """What a word in this column says, None when it says nothing."""
    kinds = _ALL if is_named else _find_kinds(column)
    return next((_WORDS[kind][word] for kind in kinds if word in _WORDS.get(kind, ())), None)


def _find_kinds(column: str) -> frozenset[str]:
    name = squeeze(column)
    return _KINDS.get(name) or _KINDS.get(name.removeprefix("is")) or frozenset()


def _read_number(value: object) -> str:
    """One of _NUMBERS, _MANY for other numbers and for what only may judge, or _TEXT."""
    if isinstance(value, bool):
        return _MANY
    try:
        number = float(str(value))
    except ValueError:
        return _TEXT
    return str(int(number)) if number in (-1, 0, 1) else _MANY
