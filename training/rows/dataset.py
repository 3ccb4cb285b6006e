"""From sources to token rows: filter, draw, mix, encode, hold out; and a report on the data."""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from training.config import DataConfig
from training.errors import ConfigError
from training.rows.chats import Chat
from training.rows.encoding import Row, encode, encode_apart, find_unshown
from training.rows.keywords import mentions_safety
from training.rows.overlap import find_overlaps
from training.rows.readers import Source, refuse_left_out, show_rows
from training.rows.shapes import Ledger

MAX_LISTED_ROWS = 5
"""How many rows a message lists before it ends in "…"."""
MAX_LISTED_COLUMNS = 20
"""Likewise columns."""
PREVIEW_ROWS = 3


@dataclass(frozen=True, slots=True)
class Report:
    """Statistics of the rows, and where those with a defect came from."""

    sha256: str
    """Digest of all turns, before rows are left out."""
    rows: int
    tokens: int
    answer_tokens: int
    lengths: dict[str, float] = field(default_factory=dict)
    """Least, median, 95th percentile and most tokens of a row."""
    duplicates: list[str] = field(default_factory=list)
    """Rows with the same turns as an earlier row."""
    empty: list[str] = field(default_factory=list)
    """Rows without an answer token to learn, left out."""
    too_long: list[str] = field(default_factory=list)
    """Rows over data.max_tokens: cut, dropped or refused."""
    overlap: list[str] = field(default_factory=list)
    """Rows that share text with an evaluation set, with the set's name."""
    left_out: list[str] = field(default_factory=list)
    """Rows that are no chats, and those that are rejected, each with the reason."""
    rejected: list[str] = field(default_factory=list)
    """Those left out because they say that their answer is a bad one."""
    silent: list[str] = field(default_factory=list)
    """Rows with an empty answer before the last, which has no loss."""
    blank: list[str] = field(default_factory=list)
    """Rows with an empty question."""
    columns: dict[str, str] = field(default_factory=dict)
    """What each column is used as."""
    unused: dict[str, int] = field(default_factory=dict)
    """In how many rows a column, or a key of turns, has a value that is not used."""
    unshown: dict[str, int] = field(default_factory=dict)
    """In how many rows the base's chat template leaves something out."""
    notes: list[str] = field(default_factory=list)
    """How files were read, where that was not plain."""

    def text(self) -> str:
        """The report in lines for the terminal."""
        lines = [f"{self.rows} rows, {self.tokens} tokens, {self.answer_tokens} of them in answers"]
        if self.lengths:
            lines.append("tokens per row: " + ", ".join(f"{name} {value:g}" for name, value in self.lengths.items()))
        for rows, what in (
            (self.duplicates, "are repeated"),
            (self.empty, "have no answer to learn and are left out"),
            (self.too_long, "are longer than data.max_tokens"),
            (self.overlap, "overlap with an evaluation set"),
            (self.silent, "have an empty answer before the last, which is not learned"),
            (self.blank, "have an empty question"),
        ):
            if rows:
                lines.append(f"{len(rows)} rows {what}: {_list_some(rows)}")
        rejected = set(self.rejected)
        unread = [row for row in self.left_out if row not in rejected]
        for rows, what in ((unread, "cannot be read"), (self.rejected, "say that their answer is a bad one")):
            if rows:
                lines.append(f"{len(rows)} rows {what} and are left out: {show_rows(rows)}")
        if self.columns:
            lines.append("columns: " + ", ".join(f"{column!r} as {part}" for column, part in self.columns.items()))
        for counts, what in ((self.unused, "not used"), (self.unshown, "left out by the base's chat template")):
            if counts:
                items = [f"{name[:60]!r} ({count} rows)" for name, count in counts.items()]
                lines.append(f"{what}: {_list_some(items, limit=MAX_LISTED_COLUMNS)}")
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rows to train on and rows held out, with their report."""

    train: list[Row]
    validation: list[Row]
    report: Report
    first: tuple[Row, ...] = ()
    """The first rows in the order of their source."""


def build_dataset(config: DataConfig, tokenizer: Any, *, answers_apart: bool = False) -> Dataset:
    """Read and encode everything; ConfigError for whatever must not be trained on. With `answers_apart` each answer of
    a chat is a row of its own (see `encode_apart`).
    """
    ledger = Ledger()
    chats = collect_chats(config, ledger)
    overlap = find_overlaps(chats, config.against)
    if overlap and not config.allow_overlap:
        raise ConfigError(
            f"{len(overlap)} rows overlap with the evaluation sets in data.against: {_list_some(overlap, '; ')}: "
            "remove them, or set data.allow_overlap = true"
        )
    encoded = _encode(chats, config, tokenizer, ledger, answers_apart=answers_apart)
    rows, too_long = [row for group in encoded.groups for row in group], encoded.too_long
    if config.strict:
        refuse_left_out(ledger.left_out)
    if too_long and config.too_long == "refuse":
        raise ConfigError(
            f"{len(too_long)} rows have more than data.max_tokens = {config.max_tokens} tokens: "
            f'{_list_some(too_long)}: raise it, or set data.too_long to "cut" or "drop"'
        )
    if not rows:
        reasons = f"; {show_rows(ledger.left_out)}" if ledger.left_out else ""
        raise ConfigError(
            f"no row of {config.path!r} is left to train on: check its answers and data.max_tokens{reasons}"
        )
    first = tuple(rows[:PREVIEW_ROWS])
    train, validation = _hold_out(encoded.groups, config)
    report = _make_report(chats, rows, ledger)
    unshown = dict(encoded.unshown.most_common())
    report = replace(report, empty=encoded.empty, too_long=too_long, overlap=overlap, unshown=unshown)
    return Dataset(train, validation, report, first)


@dataclass(slots=True)
class _Encoded:
    """The rows of each chat, and the chats with a defect."""

    groups: list[list[Row]] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    unshown: Counter[str] = field(default_factory=Counter)


def _encode(
    chats: Iterable[Chat], config: DataConfig, tokenizer: Any, ledger: Ledger, *, answers_apart: bool
) -> _Encoded:
    encoded = _Encoded()
    for chat in chats:
        try:
            encoded.unshown.update(find_unshown(tokenizer, chat))
            rows = encode_apart(tokenizer, chat) if answers_apart else [encode(tokenizer, chat)]
        except ConfigError as error:
            ledger.left_out.append(str(error))
            continue
        longest = max((len(row.ids) for row in rows), default=0)
        if longest > config.max_tokens:
            encoded.too_long.append(f"{chat.where} ({longest})")
            if config.too_long != "cut":
                continue
        cut = [row.cut(config.max_tokens) for row in rows]
        rows = [row for row in cut if row.is_target.any()]
        if chat.is_empty(-1) or not rows:
            encoded.empty.append(chat.where)
            continue
        weight = next((weight for text, weight in config.weights.items() if chat.answer.startswith(text)), 1.0)
        encoded.groups.append([replace(row, weight=weight) for row in rows])
    if (count := sum(map(len, encoded.groups))) > len(encoded.groups):
        ledger.notes.append(f"the {count} answers of {len(encoded.groups)} chats are a row each, for lora.answer_only")
    return encoded


def collect_chats(config: DataConfig, ledger: Ledger | None = None) -> list[Chat]:
    """The rows of data.path, filtered and drawn, followed by those mixed in; the ledger receives what was left out."""
    ledger = ledger or Ledger()
    chats = Source(config.path, config.format, config.columns, config.split, config.seed).read(ledger)
    if config.filter != "all":
        chats = [chat for chat in chats if mentions_safety(chat) == (config.filter == "safety")]
        if not chats:
            raise ConfigError(f"data.filter = {config.filter!r} leaves no row of {config.path!r}: set it to all")
    if config.rows:
        chats = _draw(chats, min(config.rows, len(chats)), f"rows/{config.seed}")
    own_rows = len(chats)
    own_share = 1 - sum(config.mix.values())
    for path, share in config.mix.items():
        count = max(1, round(share / own_share * own_rows))
        further = Source(path, split=config.split, seed=config.seed).read(ledger)
        chats += _draw(further, count, f"mix/{path}/{config.seed}")
    return chats


def digest(chats: Iterable[Chat]) -> str:
    """sha256 hex over all turns in order."""
    sha256 = hashlib.sha256()
    for chat in chats:
        sha256.update(chat.serialize() + b"\n")
    return sha256.hexdigest()


def _draw(chats: Sequence[Chat], count: int, seed: str) -> list[Chat]:
    """`count` rows by seed; when there are fewer, all of them again and again."""
    drawn: list[Chat] = []
    rng = random.Random(seed)
    while len(drawn) < count:
        drawn += rng.sample(list(chats), min(len(chats), count - len(drawn)))
    return drawn


def _hold_out(groups: list[list[Row]], config: DataConfig) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows held out) of all chats, which are shuffled in place; a chat's rows stay together."""
    random.Random(f"validation/{config.seed}").shuffle(groups)
    count = round(config.validation * len(groups))
    validation = [row for group in groups[:count] for row in group]
    # A held-out row may be repeated, for example mixed in: its copies must not be trained on.
    held_out = {row.ids.tobytes() for row in validation}
    train = [row for group in groups[count:] for row in group if row.ids.tobytes() not in held_out]
    if not train:
        raise ConfigError(
            f"data.validation = {config.validation} leaves none of {len(groups)} rows to train on: lower it"
        )
    return train, validation


def _make_report(chats: Sequence[Chat], rows: Sequence[Row], ledger: Ledger) -> Report:
    lengths = sorted(len(row.ids) for row in rows)
    seen: set[bytes] = set()
    duplicates = []
    for chat in chats:
        content = hashlib.sha256(chat.serialize()).digest()
        if content in seen:
            duplicates.append(chat.where)
        seen.add(content)
    summary = {
        "least": lengths[0],
        "median": median(lengths),
        "95 %": lengths[int(0.95 * (len(lengths) - 1))],
        "most": lengths[-1],
    }
    answer_tokens = sum(int(row.is_target.sum()) for row in rows)
    columns: dict[str, str] = {}
    for column, part in sorted(ledger.used):
        columns[column] = f"{columns[column]} or {part}" if column in columns else part
    return Report(
        digest(chats), len(rows), sum(lengths), answer_tokens, summary, duplicates,
        left_out=ledger.left_out, rejected=ledger.rejected, silent=ledger.silent,
        blank=ledger.blank, columns=columns,
        unused={column: count for column, count in ledger.unused.most_common() if count}, notes=ledger.notes,
    )  # fmt: skip


def _list_some(rows: Sequence[str], separator: str = ", ", limit: int = MAX_LISTED_ROWS) -> str:
    return separator.join([*rows[:limit], *["…"] * (len(rows) > limit)])
