"""Evaluation files as rows with line numbers and column names: CSV with any separator, JSON, JSONL, Parquet, text."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_clients.errors import DataError
from eval_clients.tasks.delimited import LINES, SEPARATORS, AmbiguousError, Grid, split_table
from eval_clients.tasks.text import decode_text, read_bytes

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
UNREAD = {".yaml": "YAML", ".yml": "YAML", ".toml": "TOML"}
"""Suffixes of files that would be read as lines of text, and are none."""
PARQUET = b"PAR1"
WRAPPERS = ("data", "rows", "examples", "train", "test")
"""Keys that a JSON file may keep its rows under; any other, if it is the only one."""
TURN = {"role", "content"}


@dataclass(frozen=True, slots=True)
class Row:
    """A row's cells by column: strings, or any JSON value. `line` is where it begins (from 1)."""

    line: int
    cells: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a file. `bare` says that its columns have no names but their numbers."""

    path: Path
    format: str
    """For people: `CSV (semicolons)`, `JSONL`, `text, one prompt a line`."""
    names: Sequence[str]
    rows: Sequence[Row]
    bare: bool = False
    unit: str = "line"
    """What `Row.line` counts."""
    encoding: str = ""
    notes: Sequence[str] = ()

    @property
    def place(self) -> str:
        """The file as error messages name it, with its encoding if that was a guess."""
        return f"{str(self.path)!r}{f' (read as {self.encoding})' if self.encoding else ''}"

    @property
    def typed(self) -> bool:
        """Whether cells are JSON values: an empty prompt is a mistake there, and a blank cell in CSV is not."""
        return self.format.startswith("JSON")


def read_table(path: Path, known: Sequence[Collection[str]], given: Collection[str] = ()) -> Table:
    """The file as a table. `known` and `given` are normalized column names that mark a header (see `split_table`).

    DataError when the file is absent, empty, no table, or could be read in two ways.
    """
    data = read_bytes(path)
    if data.startswith(PARQUET):
        return _read_parquet(path)
    text = decode_text(path, data)
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    kind = next((UNREAD[suffix] for suffix in suffixes if suffix in UNREAD), None)
    if kind is not None:
        raise DataError(f"{str(path)!r} is {kind}; expected CSV, JSON, JSONL, Parquet or text: save it as one of these")
    if any(suffix in JSON_SUFFIXES for suffix in suffixes) or _is_json(text.text):
        return _read_json(path, text.text, text.encoding)
    if not text.text.strip("".join(SEPARATORS) + '"\r\n '):
        raise DataError(f"{str(path)!r} has only blank rows; expected at least one prompt")
    try:
        grid = split_table(text.text, known, given, prose=".txt" in suffixes)
    except AmbiguousError as error:
        raise DataError(f"{str(path)!r}: {error}") from None
    return _name_columns(path, grid, text.encoding)


def _name_columns(path: Path, grid: Grid, encoding: str) -> Table:
    width = max((len(line.cells) for line in grid.lines), default=0)
    names = _make_unique(grid.header) if grid.header else [str(number) for number in range(1, width + 1)]
    rows = [Row(line.number, dict(zip(names, line.cells, strict=False))) for line in grid.lines]
    kind = "text, one value a line" if grid.separator == LINES else f"columns split by {SEPARATORS[grid.separator]}"
    return Table(path, kind, names, rows, not grid.header, encoding=encoding, notes=grid.notes)


def _make_unique(names: Sequence[str]) -> list[str]:
    """The names, a second one of the same kind with its column's number."""
    return [name if name and name not in names[:n] else f"{name}#{n + 1}" for n, name in enumerate(names)]


def _is_json(text: str) -> bool:
    """Whether a text without the suffix of JSON is JSON all the same."""
    start = text.lstrip()
    if start[0] not in "[{":
        return False
    for candidate in (start, start.split("\n", 1)[0]):
        try:
            return isinstance(json.loads(candidate), list | dict)
        except (ValueError, RecursionError):
            continue
    return False


def _read_json(path: Path, text: str, encoding: str) -> Table:
    """One JSON value (a list of objects or strings, alone or under a key, or columns), or one object a line."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    whole = None
    if len(lines) > 1 or text.lstrip().startswith("["):
        try:
            whole = _parse(path, 1, text)
        except DataError:
            if text.lstrip().startswith("["):
                raise
    if whole is None and len(lines) == 1:
        whole = _unwrap(_parse(path, *lines[0]))
        whole = whole if isinstance(whole, list) else None
    if whole is not None:
        found, unit, kind = list(enumerate(_list_rows(path, whole), 1)), "row", "JSON"
    else:
        found, unit, kind = [(number, _parse(path, number, line)) for number, line in lines], "line", "JSONL"
    rows = []
    for number, value in found:
        if not isinstance(value, dict | str):
            raise DataError(f"{str(path)!r} {unit} {number}: expected an object, not {json.dumps(value)[:100]}")
        rows.append(Row(number, value if isinstance(value, dict) else {"prompt": value}))
    if not rows:
        raise DataError(f"{str(path)!r} holds an empty list; expected at least one row")
    return Table(path, kind, _collect_names(rows), rows, unit=unit, encoding=encoding)


def _collect_names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(str(name) for row in rows for name in row.cells))


def _parse(path: Path, number: int, text: str) -> Any:
    """A JSON value; DataError with its line when it is none, or has a key twice."""

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
        return value

    try:
        return json.loads(text, object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{str(path)!r} line {number} is not valid JSON: {error}") from None


def _unwrap(value: Any) -> Any:
    """The rows in an object that holds one list of them, or one list per column; the value itself if it is neither."""
    if not isinstance(value, dict):
        return value
    columns = [list(part.values()) if isinstance(part, dict) else part for part in value.values()]
    lists = {key: part for key, part in zip(value, columns, strict=True) if isinstance(part, list)}
    tables = [key for key, part in lists.items() if part and all(isinstance(row, dict) for row in part)]
    tables = [key for key in tables if not all(row.keys() >= TURN for row in lists[key])]  # a chat is one row
    if len(tables) == 1 and (len(value) == 1 or tables[0] in WRAPPERS):
        return lists[tables[0]]
    scalars = [key for key, part in lists.items() if not any(isinstance(cell, dict | list) for cell in part)]
    if len(value) > 1 and len(scalars) == len(value) and len({len(part) for part in lists.values()}) == 1:
        return [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)]
    if len(value) == 1 and scalars:
        (name,) = scalars
        return [cell if name in WRAPPERS else {name: cell} for cell in lists[name]]
    return value


def _list_rows(path: Path, whole: Any) -> list[Any]:
    rows = _unwrap(whole)
    if isinstance(rows, list):
        return rows
    keys = ", ".join(repr(str(key)[:40]) for key in list(rows)[:8]) if isinstance(rows, dict) else repr(rows)[:100]
    raise DataError(f"{str(path)!r} is JSON without one list of rows (it has {keys}); expected a list of objects")


def _read_parquet(path: Path) -> Table:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(
            f"{str(path)!r} is Parquet, which needs pyarrow: `pip install pyarrow`, or save it as JSONL"
        ) from None
    try:
        records = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{str(path)!r} is not valid Parquet: {str(error)[:100]}") from None
    rows = [Row(number, record) for number, record in enumerate(records, 1)]
    if not rows:
        raise DataError(f"{str(path)!r} has no rows; expected at least one")
    return Table(path, "JSON values in Parquet", _collect_names(rows), rows, unit="row")
