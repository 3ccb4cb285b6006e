"""Training rows that share text with evaluation sets."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from training.errors import ConfigError
from training.rows.chats import Chat
from training.rows.opening import find_encoding, find_suffix, open_text

NGRAM = 8
"""Consecutive words that two texts must share to overlap; shorter texts must be equal."""
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")


def find_overlaps(chats: Sequence[Chat], against: Sequence[str]) -> list[str]:
    """`ROW with SET` for each row whose prompt shares NGRAM consecutive words with a text of an evaluation set, or
    equals a shorter one.
    """
    overlaps = []
    for path in map(Path, against):
        known = {ngram for text in read_texts(path) for ngram in _ngrams(text)}
        overlaps += [f"{chat.where} with {path.name}" for chat in chats if known & set(_ngrams(chat.prompt))]
    return overlaps


def read_texts(path: Path) -> Iterator[str]:
    """Every string of at least three words in a CSV, JSON or JSONL file, or in those of a folder."""
    if not path.exists():
        raise ConfigError(f"data.against: there is no {str(path)!r}: expected a file or a folder")
    files = sorted(file for file in path.rglob("*") if find_suffix(file) in SUFFIXES) if path.is_dir() else [path]
    for file in files:
        with open_text(file, find_encoding(file), "") as stream:
            content = stream.read()
        try:
            if find_suffix(file) in (".csv", ".tsv"):
                delimiter = "\t" if find_suffix(file) == ".tsv" else ","
                parsed: Any = list(csv.reader(io.StringIO(content, newline=""), delimiter=delimiter))
            elif find_suffix(file) == ".json":
                parsed = json.loads(content)
            else:
                parsed = [json.loads(line) for line in content.split("\n") if line.strip()]
        except (csv.Error, ValueError, RecursionError) as error:
            raise ConfigError(f"data.against: {file.name!r} cannot be read: {error}") from None
        yield from (text for text in _strings(parsed) if len(text.split()) >= 3)


def _strings(value: Any) -> Iterator[str]:
    """All strings inside parsed JSON, object keys excepted."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _ngrams(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    if len(words) < NGRAM:
        yield tuple(words)
    for i in range(len(words) - NGRAM + 1):
        yield tuple(words[i : i + NGRAM])
