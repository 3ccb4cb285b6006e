"""The prompts of an evaluation file with what stands beside them, and a report of how the file was read."""

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from eval_clients.errors import DataError
from eval_clients.tasks.delimited import normalize_name
from eval_clients.tasks.labels import classify_label
from eval_clients.tasks.layouts import NAMES, OTHERS, Assignment, Role, assign_columns
from eval_clients.tasks.marks import note_prompts
from eval_clients.tasks.table import Row, Table, read_table

LIST = re.compile(r"""\s*\[\s*(?:\{\s*)?["'].*["'](?:\s*\})?\s*\]\s*""", re.DOTALL)
"""A cell that may hold a list of texts or turns, as tables of JSON have it."""
PROMPT_WIDTH = 80
"""Characters of the first prompt that a report shows."""
Label = Literal["safe", "unsafe"]


@dataclass(frozen=True, slots=True)
class Reading:
    """How a file was read."""

    file: str
    format: str
    prompts: int
    first: str
    """The first prompt, cut to one line."""
    columns: Mapping[Any, str]
    """Column by role."""
    unused: Sequence[str] = ()
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def __str__(self) -> str:
        used = ", ".join(f"{role} from {column!r}" for role, column in self.columns.items())
        lines = [
            f"{self.file}: {self.prompts} prompt{'s' * (self.prompts != 1)} ({self.format})",
            f"  first: {self.first}",
            f"  columns: {used}",
        ]
        if self.unused:
            lines.append(f"  not used: {', '.join(map(repr, self.unused))}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


Columns = Mapping[str, str]
"""The columns that the user named, by role."""
Report = Callable[[Reading], None]
"""Takes how a file was read."""


def ignore(reading: Reading) -> None:
    """The report of those who do not ask for one."""


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt with its context, and the cells of other roles."""

    prompt: str
    cells: Mapping[Role, Any]
    line: int
    index: int
    """The row's number in the file, from 0, blank ones not counted."""


@dataclass(frozen=True, slots=True)
class Items:
    """The prompts of a file, in order."""

    table: Table
    assignment: Assignment
    items: Sequence[Item]
    notes: Sequence[str] = ()

    def where(self, item: Item) -> str:
        """The file and the item's line, as error messages name them."""
        return f"{self.table.place} {self.table.unit} {item.line}"

    def keep_label(self, label: Label, word: str, insist: bool) -> "Items":
        """Only the items with that label or none; all of them where no label of the file says safe or unsafe.

        DataError when none is left, or when the user named the column (`insist`) and it says neither; `word` is what
        messages call the label.
        """
        values, column = [item.cells.get("label") for item in self.items], self.assignment.roles.get("label", "")
        found = [classify_label(value, column) for value in values]
        if not any(found):
            if insist:
                raise DataError(
                    f"{self.where(self.items[0])}: the label is {str(values[0])[:100]!r}; expected safe or unsafe, "
                    "harmless or harmful"
                )
            roles: dict[Role, str] = {role: column for role, column in self.assignment.roles.items() if role != "label"}
            kinds = [*dict.fromkeys(str(value)[:40] for value in values if value not in (None, ""))][:4]
            said = f"all are asked: {column!r} says neither safe nor unsafe, but {', '.join(map(repr, kinds))}"
            notes = [*self.notes, *[said] * bool(kinds)]
            return replace(self, assignment=replace(self.assignment, roles=roles), notes=notes)
        wanted = [value in (None, "") or kind == label for value, kind in zip(values, found, strict=True)]
        items = [item for item, keep in zip(self.items, wanted, strict=True) if keep]
        if not items:
            kinds = [*dict.fromkeys(str(value)[:40] for value in values)][:4]
            raise DataError(
                f"{self.table.place} has no rows of kind {word!r}; expected at least one, or rows without `{column}`, "
                f"which has {', '.join(map(repr, kinds))}; --column label= asks all rows"
            )
        others = Counter(str(value)[:40] for value, keep in zip(values, wanted, strict=True) if not keep)
        notes = [f"left out of {self.assignment.roles['label']} {value!r}: {count}" for value, count in others.items()]
        return replace(self, items=items, notes=[*self.notes, *notes])

    def describe(self) -> Reading:
        """How the file was read."""
        used = dict(self.assignment.roles)
        unused = [name for name in self.table.names if name not in used.values()]
        encoding = f", {self.table.encoding}" if self.table.encoding else ""
        layout = f", {self.assignment.layout}" if self.assignment.layout else ""
        first = cut_line(self.items[0].prompt) if self.items else ""
        notes = [*self.table.notes, *self.assignment.notes, *self.notes]
        kind = f"{self.table.format}{layout}{encoding}"
        return Reading(str(self.table.path), kind, len(self.items), first, used, unused, notes)


def cut_line(text: str) -> str:
    """A text in one line of at most `PROMPT_WIDTH` characters."""
    line = " ".join(text[: 10 * PROMPT_WIDTH].split())
    return line if len(line) <= PROMPT_WIDTH and len(text) <= 10 * PROMPT_WIDTH else f"{line[: PROMPT_WIDTH - 1]}…"


def read_items(
    path: Path,
    columns: Columns,
    wanted: Sequence[Role],
    required: Sequence[Role] = ("prompt",),
    *,
    names: Mapping[Role, Sequence[str]] = NAMES,
    strip: bool = True,
) -> Items:
    """The prompts of a file, each joined with its context. `columns` are those the user named, by role, `names` those
    that roles have here where they differ from `NAMES`; `strip` cuts the space around prompts of files that are not
    JSON. DataError names the line of what is wrong.
    """
    given = {normalize_name(name) for name in columns.values()} - {""}
    table = read_table(path, (NAMES["prompt"], (*NAMES["answer"], *OTHERS)), given)
    assignment = assign_columns(table, columns, wanted, required, {**NAMES, **names})
    items, blank, contexts = [], 0, 0
    for index, row in enumerate(assignment.rows):
        prompt = _read_prompt(table, row, assignment.roles, required)
        if not prompt.strip():
            blank += 1
            continue
        prompt = prompt.strip() if strip and not table.typed else prompt
        context = _read_context(table, row, assignment)
        contexts += bool(context)
        if context:
            prompt = assignment.join.format(context=context, prompt=prompt)
        cells = {role: row.cells[column] for role, column in assignment.roles.items() if column in row.cells}
        items.append(Item(prompt, cells, row.line, index))
    if not items:
        label = " with the label safe or unsafe" if "label" in required else ""
        raise DataError(
            f"{table.place} holds no prompts{label}; expected at least one in column {assignment.roles['prompt']!r}"
        )
    notes = [f"asked with their context: {contexts}"] if contexts else []
    notes += [f"left out without a prompt: {blank}"] if blank else []
    notes += note_prompts([item.prompt for item in items])
    return Items(table, assignment, items, notes)


def _read_prompt(table: Table, row: Row, roles: Mapping[Role, str], required: Sequence[Role]) -> str:
    """The prompt as it stands; blank cells are allowed where all cells are text. DataError for other values."""
    where, column = f"{table.place} {table.unit} {row.line}", roles["prompt"]
    if not table.typed:
        cell = str(row.cells.get(column, ""))
        value = _read_turn(_parse_list(cell), where, column) if LIST.fullmatch(cell) else cell
        return value if isinstance(value, str) else cell
    absent = [roles[role] for role in required if roles[role] not in row.cells]
    if absent:
        raise DataError(f"{where}: expected an object with {', '.join(required)}; it has no {absent[0]!r}")
    value = _read_turn(row.cells[column], where, column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: `{column}` is {repr(value)[:100]}; expected a non-empty string")
    return value


def _read_turn(value: object, where: str, column: str) -> object:
    """The text of a conversation of one turn, which may say that it is the user's; any other value as it is.

    DataError for a conversation of more turns: one is asked.
    """
    if not isinstance(value, list) or not value or not all(isinstance(turn, str | dict) for turn in value):
        return value
    if len(value) > 1:
        raise DataError(f"{where}: `{column}` has {len(value)} turns; expected one, which is asked alone")
    (turn,) = value
    if isinstance(turn, dict) and turn.get("role", turn.get("from")) in ("user", "human"):
        return turn.get("content", turn.get("value"))
    return turn


def _parse_list(cell: str) -> object:
    """The list that a cell holds, as JSON or as Python prints it; the cell itself when it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return cell


def _read_context(table: Table, row: Row, assignment: Assignment) -> str:
    column = assignment.roles.get("context")
    value = row.cells.get(column) if column else None
    if value is None or value == "" or value != value:  # NaN, as pandas writes a missing cell
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{table.place} {table.unit} {row.line}: `{column}` is {repr(value)[:100]}; expected a string, or leave it "
            "out with --column context="
        )
    return "" if value.strip().lower() in ("nan", "none", "null") else value.strip()
