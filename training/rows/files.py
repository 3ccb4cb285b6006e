"""From a file to its raw rows: JSON, JSONL, CSV and TSV, each also compressed, and Parquet."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from training.errors import ConfigError
from training.rows.opening import find_encoding, find_suffix, load_pyarrow, open_bytes, open_text
from training.rows.tables import Broken, join_row, look_like_rows, name_columns, note_joined, record

MAX_ROW_CHARACTERS = 2**26
"""Characters of a line of JSONL, or of a field of CSV."""
MAX_DOCUMENT_CHARACTERS = 2**30
"""Characters of a JSON file that is one array or object, and thus parsed as a whole."""
_DELIMITERS = ",;\t|"
_LIST_KEYS = ("train", "data", "rows", "examples", "instances", "items")
"""Keys under which files hold their list of rows, after data.split."""
_MAX_DEPTH = 3
"""How deep in an object that list may be."""
_BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Reader:
    """How to read a file: which part of it, what a row looks like, and where to put what the user should know."""

    split: str
    is_row: Callable[[Any], bool]
    """Whether an object is a row by its keys."""
    notes: list[str]

    def read(self, path: Path) -> Iterator[tuple[str, Any]]:
        """(`file:line` or `file:[number]`, row or Broken) of every row. ConfigError when there are none to be had."""
        with open_bytes(path) as stream:
            is_parquet = stream.read(4) == b"PAR1"
        if is_parquet:
            yield from _read_parquet(path)
            return
        encoding = find_encoding(path)
        if encoding not in ("utf-8", "utf-8-sig"):
            self.notes.append(f"{path.name} is read as {'Windows-1252' if encoding == 'cp1252' else encoding.upper()}")
        suffix = find_suffix(path)
        if suffix in (".json", ".jsonl", ".ndjson", "") or _starts_json(path, encoding):
            yield from self._read_json(path, encoding)
        elif suffix in (".csv", ".tsv", ".tab"):
            yield from self._read_table(path, encoding)
        else:
            raise ConfigError(f"{path.name} has the suffix {suffix!r}: expected JSON, JSONL, CSV, TSV or Parquet")

    def _read_json(self, path: Path, encoding: str) -> Iterator[tuple[str, Any]]:
        """One document, several documents, or a document per line, of which some may be broken."""
        with open_text(path, encoding, "\n") as stream:
            filled = ((number, line) for number, line in enumerate(_lines(stream, path), 1) if line.strip())
            first, second = next(filled, None), next(filled, None)
        if first is None:
            return
        if second is None or isinstance(_parse(first[1]), Broken):
            with open_text(path, encoding, "\n") as stream:
                documents = _parse_documents(stream.read(MAX_DOCUMENT_CHARACTERS + 1))
            line, document = documents[0]
            if not isinstance(document, Broken):
                rows = self._unwrap(document, path) if len(documents) == 1 else documents
                yield from ((f"{path.name}:{place or line}", row) for place, row in rows)
                return
            if find_suffix(path) == ".json" and first[1].lstrip().startswith("["):
                raise ConfigError(f"{path.name} {document.reason}")
        with open_text(path, encoding, "\n") as stream:
            for number, text in enumerate(_lines(stream, path), 1):
                if text.strip():
                    yield f"{path.name}:{number}", _parse(text)

    def _unwrap(self, document: Any, path: Path) -> Iterator[tuple[int | str, Any]]:
        """(`[number]`, row) of the rows in a document; (``, document) when it is one itself."""
        rows: Sequence[Any] | None = None
        if isinstance(document, list):
            rows = None if _is_chat(document) else document
        elif isinstance(document, Mapping):
            rows = self._find_list(document, path)
        if rows is None:
            yield "", document
        else:
            yield from ((f"[{i}]", row) for i, row in enumerate(rows, 1))

    def _find_list(self, document: Mapping[str, Any], path: Path, depth: int = 0) -> Sequence[Any] | None:
        """The rows inside an object: a list or a table, here or under a key; None when the object is a row."""
        if self.is_row(document):
            return _transpose(document)
        if (table := _read_split(document)) is not None:
            return table
        inner = {key: value for key, value in document.items() if isinstance(value, list | dict)}
        key = next((key for key in (self.split, *_LIST_KEYS) if key in inner), None)
        if key is None:
            lists = [
                key for key, value in inner.items() if isinstance(value, list) and value and isinstance(value[0], dict)
            ]
            key = lists[0] if len(lists) == 1 else None
        if key is not None and depth < _MAX_DEPTH:
            others = ", ".join(repr(other[:60]) for other in list(document)[:8] if other != key)
            self.notes.append(f"{path.name}: the rows of {key!r} are read" + f", not {others}" * bool(others))
            rows = inner[key]
            return rows if isinstance(rows, list) else self._find_list(rows, path, depth + 1)
        by_name = document and all(isinstance(value, dict) for value in document.values())
        return list(document.values()) if by_name else None

    def _read_table(self, path: Path, encoding: str) -> Iterator[tuple[str, Any]]:
        with open_text(path, encoding, "") as stream, _raise_field_limit():
            lines = _lines(stream, path)
            first = next(lines, "")
            skipped = 0
            if declared := re.fullmatch(r"sep=(.)\s*", first):  # a line that Excel writes and reads
                first, skipped = next(lines, ""), 1
            preferred = declared[1] if declared else "\t" if find_suffix(path) != ".csv" else ","
            delimiter = max(preferred + _DELIMITERS, key=lambda one: len(next(csv.reader([first], delimiter=one), [])))
            if declared:
                delimiter = preferred
            if delimiter != "," and find_suffix(path) == ".csv":
                self.notes.append(f"{path.name}: the columns are separated by {delimiter!r}")
            spaced, padded = f"{delimiter} " in first, f" {delimiter}" in first
            taken: list[str] = []
            source = record(chain([first], lines), taken)
            reader = csv.reader(source, delimiter=delimiter, strict=True, skipinitialspace=spaced)
            try:
                header = name_columns(next(reader, []))
            except csv.Error as error:
                raise ConfigError(f"{path.name} is not valid CSV: its header: {error}") from None
            joined: list[str] = []
            while True:
                number = reader.line_num + skipped + 1
                taken.clear()
                try:
                    fields = next(reader, None)
                except csv.Error as error:
                    last = reader.line_num + skipped
                    span = f"; its quotes take in the lines up to {last}, which are left out" if last > number else ""
                    yield f"{path.name}:{number}", Broken(f"is not valid CSV: {error}{span}")
                    continue
                if fields is None:
                    break
                if len(taken) > 1 and look_like_rows(taken, delimiter, len(header), spaced=spaced):
                    joined.append(f"{number} to {reader.line_num + skipped}")
                if fields:
                    fields = [field.rstrip() for field in fields] if padded else fields
                    yield f"{path.name}:{reader.line_num + skipped}", join_row(header, fields)

        self.notes.extend(f"{path.name}: {note}" for note in note_joined(joined))


def _starts_json(path: Path, encoding: str) -> bool:
    with open_text(path, encoding, "") as stream:
        return stream.read(1000).lstrip()[:1] in ("[", "{")


def _parse(line: str) -> Any:
    try:
        return json.loads(line.rstrip("\n"), object_pairs_hook=_collect)
    except (ValueError, RecursionError) as error:
        return Broken(f"is not valid JSON: {error}")


def _collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; ValueError when it has a key twice, of which JSON's reader would take the last."""
    collected = dict(pairs)
    if len(collected) != len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {repeated[:60]!r} occurs twice")
    return collected


def _parse_documents(text: str) -> list[tuple[int, Any]]:
    """(line, document) of JSON values one after another; where they end before the text does, the last is Broken."""
    if len(text) > MAX_DOCUMENT_CHARACTERS:
        return [(1, Broken(f"has more than {MAX_DOCUMENT_CHARACTERS} characters: save it as JSONL, one row a line"))]
    decoder = json.JSONDecoder(object_pairs_hook=_collect)
    documents: list[tuple[int, Any]] = []
    line, counted, position = 1, 0, _skip_blank(text, 0)
    while position < len(text):
        line += text.count("\n", counted, position)
        counted = position
        try:
            document, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            return [*documents, (line, Broken(f"is not valid JSON: {error}"))]
        documents.append((line, document))
        position = _skip_blank(text, position)
    return documents


def _skip_blank(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position


def _is_chat(document: list[Any]) -> bool:
    """Whether a list holds the turns of one chat rather than rows."""
    is_text = bool(document) and all(isinstance(item, str) for item in document)
    return is_text or (
        bool(document)
        and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in document)
        and not any("parent_id" in item for item in document)  # messages of many chats
    )


def _read_split(document: Mapping[str, Any]) -> list[Any] | None:
    """The rows of {columns: [name, …], data: [[value, …], …]}, which pandas calls split; None for other objects."""
    columns, data = document.get("columns"), document.get("data")
    if not (isinstance(columns, list) and isinstance(data, list) and all(isinstance(name, str) for name in columns)):
        return None
    if not all(isinstance(row, list) and len(row) == len(columns) for row in data):
        return None
    return [dict(zip(columns, row, strict=True)) for row in data]


def drop_nulls(value: Any) -> Any:
    """The value without the null fields of its objects.

    All objects of an Arrow column have the fields of any of them, so that a tool call has the arguments of all others.
    """
    if isinstance(value, dict):
        return {key: drop_nulls(inner) for key, inner in value.items() if inner is not None}
    return [drop_nulls(inner) for inner in value] if isinstance(value, list) else value


def _transpose(table: Mapping[str, Any]) -> Sequence[Any] | None:
    """The rows of {column: [value, …]} or {column: {index: value, …}}; None for any other object."""
    if any(isinstance(value, dict) and value.keys() & {"role", "from", "content", "value"} for value in table.values()):
        return None  # turns
    columns = [list(value.values()) if isinstance(value, dict) else value for value in table.values()]
    if not all(isinstance(column, list) and column for column in columns) or len(set(map(len, columns))) != 1:
        return None
    if any(isinstance(item, dict) for column in columns for item in column):
        return None
    if len(columns) == 1 and not all(isinstance(item, list) for item in columns[0]):
        return None  # the turns of one chat, as plain strings
    return [dict(zip(table, row, strict=True)) for row in zip(*columns, strict=True)]


def _lines(stream: TextIO, path: Path) -> Iterator[str]:
    while line := stream.readline(MAX_ROW_CHARACTERS + 1):
        if len(line) > MAX_ROW_CHARACTERS:
            raise ConfigError(f"{path.name} has a line of more than {MAX_ROW_CHARACTERS} characters: split it")
        yield line


@contextmanager
def _raise_field_limit() -> Iterator[None]:
    """Let fields of CSV be as long as rows may be; the limit is one for the whole process."""
    before = csv.field_size_limit(MAX_ROW_CHARACTERS)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    pyarrow = load_pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}:[{number}]", {name: drop_nulls(value) for name, value in row.items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path.name} is not valid Parquet: {error}") from None
