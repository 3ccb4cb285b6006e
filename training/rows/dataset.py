"""From sources to token rows: filter, draw, mix, split, encode; and what is to be said about the data."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from training.config import ConfigError, DataConfig
from training.rows.encoding import Row, encode
from training.rows.keywords import speaks_of_safety
from training.rows.readers import Chat, read

NGRAM = 8
"""Words in a row that two texts must share to overlap; shorter texts must be equal."""
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Report:
    """What the rows are like. Lists hold where each row came from."""

    sha256: str
    """Of all turns, before anything is left out."""
    rows: int
    tokens: int
    answer_tokens: int
    lengths: dict[str, float] = field(default_factory=dict)
    """Least, median, 95th percentile and most tokens of a row."""
    duplicates: list[str] = field(default_factory=list)
    """Rows whose turns an earlier row has too."""
    empty: list[str] = field(default_factory=list)
    """Rows with no answer token to learn, left out."""
    too_long: list[str] = field(default_factory=list)
    """Rows over data.max_tokens: cut, dropped or refused."""
    overlap: list[str] = field(default_factory=list)
    """Rows that share text with an evaluation set: row, set."""

    def text(self) -> str:
        """For people."""
        lines = [f"{self.rows} rows, {self.tokens} tokens, {self.answer_tokens} of them answers"]
        if self.lengths:
            lines.append("tokens a row: " + ", ".join(f"{name} {value:g}" for name, value in self.lengths.items()))
        for name, what in (
            ("duplicates", "are repeated"),
            ("empty", "have no answer to learn and are left out"),
            ("too_long", "are longer than data.max_tokens"),
            ("overlap", "overlap with an evaluation set"),
        ):
            if found := getattr(self, name):
                more = ", …" if len(found) > SHOWN else ""
                lines.append(f"{len(found)} rows {what}: {', '.join(found[:SHOWN])}{more}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rows to train on and rows kept aside, with their report."""

    train: list[Row]
    validation: list[Row]
    report: Report


def build(config: DataConfig, tokenizer: Any) -> Dataset:
    """Read and encode everything; ConfigError for whatever must not be trained on."""
    chats = gather(config)
    overlap = overlaps(chats, config.against)
    if overlap and not config.allow_overlap:
        shown = "; ".join(overlap[:SHOWN])
        raise ConfigError(
            f"{len(overlap)} rows overlap with the evaluation sets in data.against: {shown}"
            f"{'; …' if len(overlap) > SHOWN else ''}. Take them out, or set data.allow_overlap = true"
        )
    rows, empty, long = [], [], []
    for chat in chats:
        row = encode(tokenizer, chat)
        if len(row.ids) > config.max_tokens:
            long.append(f"{chat.where} ({len(row.ids)})")
            if config.too_long != "cut":
                continue
            row = row.cut(config.max_tokens)
        if not chat.answer.strip() or not row.wanted.any():
            empty.append(chat.where)
            continue
        weight = next((many for text, many in config.weights.items() if chat.answer.startswith(text)), 1.0)
        rows.append(replace(row, weight=weight))
    if long and config.too_long == "refuse":
        raise ConfigError(
            f"{len(long)} rows have more than data.max_tokens = {config.max_tokens} tokens: {', '.join(long[:SHOWN])}"
            f'{", …" if len(long) > SHOWN else ""}. Raise it, or set data.too_long to "cut" or "drop"'
        )
    if not rows:
        raise ConfigError(f"no row of {config.path!r} is left to train on")
    random.Random(f"validation/{config.seed}").shuffle(rows)
    aside = round(config.validation * len(rows))
    if aside >= len(rows):
        raise ConfigError(f"data.validation = {config.validation} leaves nothing of {len(rows)} rows to train on")
    # What is repeated, mixed in for one, must not be trained on as well.
    held = {row.ids.tobytes() for row in rows[:aside]}
    train = [row for row in rows[aside:] if row.ids.tobytes() not in held]
    if not train:
        raise ConfigError(f"data.validation = {config.validation} leaves no row to train on that it does not hold")
    return Dataset(train, rows[:aside], _report(chats, rows, empty, long, overlap))


def gather(config: DataConfig) -> list[Chat]:
    """The rows of data.path, filtered and drawn, and those mixed in."""
    chats = read(config.path, format=config.format, split=config.split, seed=config.seed)
    if config.filter != "all":
        chats = [chat for chat in chats if speaks_of_safety(chat) == (config.filter == "safety")]
        if not chats:
            raise ConfigError(f"data.filter = {config.filter!r} leaves no row of {config.path!r}")
    if config.rows:
        chats = _drawn(chats, min(config.rows, len(chats)), f"rows/{config.seed}")
    own = len(chats)
    left = 1 - sum(config.mix.values())
    for path, share in config.mix.items():
        wanted = max(1, round(share / left * own))
        chats += _drawn(read(path, split=config.split, seed=config.seed), wanted, f"mix/{path}/{config.seed}")
    return chats


def _drawn(chats: Sequence[Chat], count: int, seed: str) -> list[Chat]:
    """`count` rows by seed; more than there are: all, again and again."""
    found: list[Chat] = []
    chance = random.Random(seed)
    while len(found) < count:
        found += chance.sample(list(chats), min(len(chats), count - len(found)))
    return found


def _report(
    chats: Sequence[Chat], rows: Sequence[Row], empty: list[str], long: list[str], overlap: list[str]
) -> Report:
    lengths = sorted(len(row.ids) for row in rows)
    seen: Counter[tuple[Any, ...]] = Counter()
    duplicates = []
    for chat in chats:
        if seen[chat.messages]:
            duplicates.append(chat.where)
        seen[chat.messages] += 1
    marks = {
        "least": lengths[0],
        "median": median(lengths),
        "95 %": lengths[int(0.95 * (len(lengths) - 1))],
        "most": lengths[-1],
    }
    answers = sum(int(row.wanted.sum()) for row in rows)
    return Report(digest(chats), len(rows), sum(lengths), answers, marks, duplicates, empty, long, overlap)


def digest(chats: Iterable[Chat]) -> str:
    """sha256 hex over all turns in order."""
    found = hashlib.sha256()
    for chat in chats:
        for role, content in chat.messages:
            found.update(f"{role}\0{content}\0".encode())
        found.update(b"\n")
    return found.hexdigest()


def overlaps(chats: Sequence[Chat], against: Sequence[str]) -> list[str]:
    """Rows whose prompt shares NGRAM words in a row with a text of an evaluation set, or equals a short one."""
    found = []
    for path in against:
        grams = {gram for text in texts(Path(path)) for gram in _grams(text)}
        found += [f"{chat.where} with {Path(path).name}" for chat in chats if grams & set(_grams(chat.prompt))]
    return found


def _grams(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    if len(words) < NGRAM:
        yield tuple(words)
    for i in range(len(words) - NGRAM + 1):
        yield tuple(words[i : i + NGRAM])


def texts(path: Path) -> Iterator[str]:
    """Every text of at least three words in a CSV, JSON or JSONL file, or in those of a folder."""

    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".csv", ".json", ".jsonl"))
    elif path.is_file():
        files = [path]
    else:
        raise ConfigError(f"data.against: there is no {str(path)!r}")

    def leaves(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            if len(value.split()) >= 3:
                yield value
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from leaves(item)

    for file in files:
        content = file.read_text(encoding="utf-8-sig")
        try:
            if file.suffix == ".csv":
                yield from leaves(list(csv.reader(io.StringIO(content, newline=""))))
            elif file.suffix == ".json":
                yield from leaves(json.loads(content))
            else:
                yield from leaves([json.loads(line) for line in content.split("\n") if line.strip()])
        except (csv.Error, ValueError) as error:
            raise ConfigError(f"data.against: {file.name} cannot be read: {error}") from None
