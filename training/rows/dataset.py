"""From sources to token rows: filter, draw, mix, encode, hold out; and a report on the data."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from training.config import DataConfig
from training.errors import ConfigError
from training.rows.encoding import Row, encode
from training.rows.keywords import mentions_safety
from training.rows.overlap import find_overlaps
from training.rows.readers import Chat, Message, read_chats

MAX_LISTED_ROWS = 5
"""How many rows a message lists before it ends in "…"."""


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
        ):
            if rows:
                lines.append(f"{len(rows)} rows {what}: {_list_some(rows)}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rows to train on and rows held out, with their report."""

    train: list[Row]
    validation: list[Row]
    report: Report


def build_dataset(config: DataConfig, tokenizer: Any) -> Dataset:
    """Read and encode everything; ConfigError for whatever must not be trained on."""
    chats = collect_chats(config)
    overlap = find_overlaps(chats, config.against)
    if overlap and not config.allow_overlap:
        raise ConfigError(
            f"{len(overlap)} rows overlap with the evaluation sets in data.against: {_list_some(overlap, '; ')}: "
            "remove them, or set data.allow_overlap = true"
        )
    rows, empty, too_long = [], [], []
    for chat in chats:
        row = encode(tokenizer, chat)
        if len(row.ids) > config.max_tokens:
            too_long.append(f"{chat.where} ({len(row.ids)})")
            if config.too_long != "cut":
                continue
            row = row.cut(config.max_tokens)
        if not chat.answer.strip() or not row.is_target.any():
            empty.append(chat.where)
            continue
        weight = next((weight for text, weight in config.weights.items() if chat.answer.startswith(text)), 1.0)
        rows.append(replace(row, weight=weight))
    if too_long and config.too_long == "refuse":
        raise ConfigError(
            f"{len(too_long)} rows have more than data.max_tokens = {config.max_tokens} tokens: "
            f'{_list_some(too_long)}: raise it, or set data.too_long to "cut" or "drop"'
        )
    if not rows:
        raise ConfigError(f"no row of {config.path!r} is left to train on: check its answers and data.max_tokens")
    train, validation = _hold_out(rows, config)
    return Dataset(train, validation, _make_report(chats, rows, empty, too_long, overlap))


def collect_chats(config: DataConfig) -> list[Chat]:
    """The rows of data.path, filtered and drawn, followed by those mixed in."""
    chats = read_chats(config.path, format=config.format, split=config.split, seed=config.seed)
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
        chats += _draw(read_chats(path, split=config.split, seed=config.seed), count, f"mix/{path}/{config.seed}")
    return chats


def digest(chats: Iterable[Chat]) -> str:
    """sha256 hex over all turns in order."""
    sha256 = hashlib.sha256()
    for chat in chats:
        for role, content in chat.messages:
            sha256.update(f"{role}\0{content}\0".encode())
        sha256.update(b"\n")
    return sha256.hexdigest()


def _draw(chats: Sequence[Chat], count: int, seed: str) -> list[Chat]:
    """`count` rows by seed; when there are fewer, all of them again and again."""
    drawn: list[Chat] = []
    rng = random.Random(seed)
    while len(drawn) < count:
        drawn += rng.sample(list(chats), min(len(chats), count - len(drawn)))
    return drawn


def _hold_out(rows: list[Row], config: DataConfig) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows held out) of all rows, which are shuffled in place."""
    random.Random(f"validation/{config.seed}").shuffle(rows)
    count = round(config.validation * len(rows))
    validation = rows[:count]
    # A held-out row may be repeated, for example mixed in: its copies must not be trained on.
    held_out = {row.ids.tobytes() for row in validation}
    train = [row for row in rows[count:] if row.ids.tobytes() not in held_out]
    if not train:
        raise ConfigError(
            f"data.validation = {config.validation} leaves none of {len(rows)} rows to train on: lower it"
        )
    return train, validation


def _make_report(
    chats: Sequence[Chat], rows: Sequence[Row], empty: list[str], too_long: list[str], overlap: list[str]
) -> Report:
    lengths = sorted(len(row.ids) for row in rows)
    seen: set[tuple[Message, ...]] = set()
    duplicates = []
    for chat in chats:
        if chat.messages in seen:
            duplicates.append(chat.where)
        seen.add(chat.messages)
    summary = {
        "least": lengths[0],
        "median": median(lengths),
        "95 %": lengths[int(0.95 * (len(lengths) - 1))],
        "most": lengths[-1],
    }
    answer_tokens = sum(int(row.is_target.sum()) for row in rows)
    return Report(digest(chats), len(rows), sum(lengths), answer_tokens, summary, duplicates, empty, too_long, overlap)


def _list_some(rows: Sequence[str], separator: str = ", ") -> str:
    return separator.join([*rows[:MAX_LISTED_ROWS], *["…"] * (len(rows) > MAX_LISTED_ROWS)])
