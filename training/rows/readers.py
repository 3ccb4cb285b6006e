"""Read training rows as chats, from files, hub data sets and the built-in data.

Every row remembers where it came from (`file:line`), and every message about it says so.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters import did_you_mean
from training.builtin.orders import draw_orders
from training.builtin.safety import read_rows
from training.config import SOURCE_HELP
from training.errors import ConfigError
from training.rows.chats import Chat
from training.rows.files import Reader, drop_nulls
from training.rows.formats import FORMATS, normalize
from training.rows.shapes import Ledger, Shape
from training.rows.tables import Broken
from training.rows.verdicts import Numbers, RejectedRowError, Splits, reject

MAX_ROWS = 20_000_000
"""Rows of one source."""
MAX_BAD_START = 10_000
"""Rows at the start of a source of which one at least must be a chat."""
SHOWN = 3
"""How many of the rows left out a message shows."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from and how they are read."""

    path: str
    """A file, `hub:NAME`, `orders:N`, `safety:train` or `safety:heldout`."""
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    """Column of each part of a chat (training.rows.shapes.PARTS)."""
    split: str = "train"
    """Split of a data set on the hub, or key of a JSON file's list of rows."""
    seed: int = 0
    """Seed of orders."""

    def read(self, ledger: Ledger) -> list[Chat]:
        """All rows that are chats; the ledger receives the others and what became of the columns.

        ConfigError for a file that is missing, empty or damaged, and when no row is a chat.
        """
        if self.format != "auto" and self.format not in FORMATS:
            hint = did_you_mean(self.format, FORMATS) or f"expected auto or one of {', '.join(FORMATS)}"
            raise ConfigError(f"data.format is {self.format!r}: {hint}")
        if self.path.startswith(("orders:", "safety:")):
            return _read_builtin(self.path, self.seed)
        shape = Shape(self.format, self.columns)
        chats: list[Chat] = []
        before, columns, number = len(ledger.left_out), set[str](), 0
        numbers, splits = Numbers("label" in self.columns), Splits()
        for number, (where, row) in enumerate(self._read_rows(shape, ledger), 1):
            if number > MAX_ROWS or (not chats and number > MAX_BAD_START):
                break
            columns.update(row if isinstance(row, Mapping) and len(columns) < MAX_BAD_START else ())
            try:
                if isinstance(row, Broken):
                    raise ValueError(row.reason)
                chats.append(shape.read(row, where, ledger))
                if isinstance(row, Mapping):
                    numbers.add(row, shape.list_tags(row), len(chats) - 1)
                    splits.add(row)
            except (ValueError, RecursionError) as error:
                ledger.leave_out(where, error)
        self._check_columns(columns)
        chats = _reject(chats, numbers, ledger)
        ledger.notes += splits.describe()
        left_out = ledger.left_out[before:]
        if not chats and left_out:
            raise ConfigError(f"no row of {self.path!r} can be read: {show_rows(left_out)}")
        if not chats:
            raise ConfigError(f"{self.path!r} has no rows: expected at least one")
        if number > MAX_ROWS:
            raise ConfigError(f"{self.path!r} has more than {MAX_ROWS} rows: split it")
        return chats

    def _read_rows(self, shape: Shape, ledger: Ledger) -> Iterator[tuple[str, Any]]:
        if self.path.startswith("hub:"):
            return _read_hub(self.path.removeprefix("hub:"), self.split)
        path = Path(self.path)
        if path.is_dir():
            raise ConfigError(f"{self.path!r} is a folder: expected {SOURCE_HELP}; hub:{self.path} reads a data set's")
        if not path.is_file():
            raise ConfigError(f"there is no file {self.path!r}: expected {SOURCE_HELP}")
        return Reader(self.split, shape.is_row, ledger.notes).read(path)

    def _check_columns(self, known: set[str]) -> None:
        names = {normalize(column) for column in known}
        for part, column in self.columns.items():
            if column and known and normalize(column) not in names:
                hint = did_you_mean(column, known) or f"expected one of {', '.join(map(repr, sorted(known)[:12]))}"
                raise ConfigError(
                    f"data.columns: {part} is {column!r}, a column that no row of {self.path!r} has: {hint}"
                )


def read_chats(
    path: str,
    *,
    format: str = "auto",
    split: str = "train",
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
) -> list[Chat]:
    """All rows of a source: a JSON, JSONL, CSV, TSV or Parquet file, `hub:NAME`, `orders:N`, `safety:train` or
    `safety:heldout`.

    `auto` recognizes the format of each row by its columns; `columns` names the column of a part of the chat, such as
    {"prompt": "question"}. `split` applies to the hub, `seed` to orders. ConfigError, with file and line, for a file
    that is missing, empty or malformed and for rows that do not match the format.
    """
    ledger = Ledger()
    chats = Source(path, format, columns or {}, split, seed).read(ledger)
    refuse_left_out(ledger.left_out)
    return chats


def refuse_left_out(left_out: list[str]) -> None:
    """ConfigError that shows some of these rows, if there are any."""
    if left_out:
        count = f"{len(left_out)} rows cannot be read: " if len(left_out) > 1 else ""
        raise ConfigError(f"{count}{show_rows(left_out)}")


def show_rows(rows: list[str]) -> str:
    """The first of the rows, and how many more there are."""
    more = [f"and {len(rows) - SHOWN} more"] * (len(rows) > SHOWN)
    return "; ".join([*(row[:600] for row in rows[:SHOWN]), *more])


def _reject(chats: list[Chat], numbers: Numbers, ledger: Ledger) -> list[Chat]:
    """The chats without those that their numbers reject, which the ledger receives."""
    rejected: dict[int, RejectedRowError] = {}
    for column, number, indices in numbers.list_rejected():
        ledger.used[column, "label"] += 1
        ledger.unused[column] -= numbers.counts[column].total()
        rejected |= {index: reject(column, int(number)) for index in indices}
    for column in numbers.list_marks():
        ledger.notes.append(f"{column!r} may rate the answers, of which all are learned: leave out those to be avoided")
    for index in sorted(rejected):
        ledger.leave_out(chats[index].where, rejected[index])
    return [chat for index, chat in enumerate(chats) if index not in rejected]


def _read_builtin(path: str, seed: int) -> list[Chat]:
    name, _, argument = path.partition(":")
    if name == "orders":
        if not argument.isdecimal() or int(argument) < 1:
            raise ConfigError(f"data.path is {path!r}: expected a number of rows, such as orders:960")
        pairs = [(row.prompt, row.answer) for row in draw_orders(int(argument), seed=seed)]
    else:
        if argument not in ("train", "heldout"):
            raise ConfigError(f"data.path is {path!r}: expected safety:train or safety:heldout")
        pairs = [(row.prompt, row.answer) for row in read_rows("train" if argument == "train" else "heldout")]
    return [
        Chat((("user", prompt), ("assistant", answer)), f"{name}:{i}") for i, (prompt, answer) in enumerate(pairs, 1)
    ]


def _read_hub(name: str, split: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"data.path 'hub:{name}' needs the package datasets: pip install datasets") from None
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # many types: no such data set, no such split, no network
        raise ConfigError(f"the data set {name!r} (split {split!r}) cannot be read: {error}") from error
    for i, row in enumerate(rows):
        yield f"{name}:{i}", {column: drop_nulls(value) for column, value in row.items()}
