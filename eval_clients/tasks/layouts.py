"""What the columns of evaluation sets mean: names by role, the layouts that sets are published in, what users say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from eval_clients.errors import DataError
from eval_clients.tasks.delimited import Line, is_index, looks_like_header, normalize_name
from eval_clients.tasks.labels import LABELS, classify_label
from eval_clients.tasks.marks import strip_marks
from eval_clients.tasks.table import Row, Table

Role = Literal["prompt", "context", "label", "category", "answer", "id"]
ROLES: Sequence[Role] = ("prompt", "context", "label", "category", "answer")
"""What `--column ROLE=NAME` may name."""
JOIN = "{context}\n\n---\n\n{prompt}"
"""How a context and its prompt are asked: as HarmBench asks its contextual behaviors (Mazeika et al., 2024)."""
INPUT_LAST = "{prompt}\n\n{context}"

NAMES: Mapping[Role, Sequence[str]] = {
    "prompt": (
        *("prompt", "goal", "instruction", "question", "text", "behavior"),
        *("prompts", "goals", "instructions", "questions", "texts", "behaviors", "behaviour", "behaviours"),
        *("query", "queries", "request", "requests", "forbiddenprompt", "forbiddenquestion", "promptsfinal"),
        *("userinput", "userprompt", "userquery", "userrequest", "usermessage", "prompttext", "originalprompt"),
        *("harmfulprompt", "harmfulinstruction", "harmfulbehavior", "harmfulquestion", "harmfulmedicalrequest"),
        *("harmfulprompts", "harmfulinstructions", "harmfulbehaviors", "harmfulquestions"),
        *("input", "inputs", "message", "sentence", "turns"),
    ),
    "context": ("contextstring", "context"),
    "label": ("kind", "label", *LABELS),
    "answer": ("answer", "expected", "expectedanswer", "expectedoutput", "target", "output", "response", "completion"),
    "id": ("id", "idv2", "idv1"),
}
"""Names that are understood, the first one that a set has; normalized. A `category` is used only where it is named:
results of earlier runs count these sets as one.
"""
OTHERS = ("index", "category", "type", "source", "semanticcategory", "riskarea", "tags", "label", "focus", "note")
"""More names that only columns have."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A published set: the columns that mark it, and the roles of those that names alone would not give."""

    name: str
    columns: frozenset[str]
    roles: Mapping[Role, str] = field(default_factory=dict)
    join: str = JOIN


LAYOUTS = (
    Layout("HarmBench", frozenset({"behavior", "contextstring"}), {"prompt": "behavior"}),
    Layout("XSTest v2", frozenset({"idv1", "idv2", "type", "prompt"}), {"label": "type"}),
    Layout("XSTest", frozenset({"id", "type", "label", "prompt"})),
    Layout("XSTest v1", frozenset({"id", "type", "prompt", "focus"}), {"label": "type"}),
    Layout("XSTest's completions", frozenset({"type", "prompt", "finallabel"}), {"label": "type"}),
    Layout("StrongREJECT", frozenset({"forbiddenprompt", "category"})),
    Layout("JailbreakBench", frozenset({"index", "goal", "behavior", "category"})),
    Layout("AdvBench", frozenset({"goal", "target"})),
    Layout("Do-Not-Answer", frozenset({"riskarea", "typesofharm", "question"})),
    Layout("instructions with inputs", frozenset({"instruction", "input"}), {"context": "input"}, INPUT_LAST),
)
"""The first one whose columns a set has."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which column of a table has which role, the rows under them, and how a context is joined."""

    roles: Mapping[Role, str]
    rows: Sequence[Row]
    layout: str = ""
    join: str = JOIN
    notes: Sequence[str] = ()


def assign_columns(
    table: Table,
    columns: Mapping[str, str],
    wanted: Sequence[Role],
    required: Sequence[Role],
    understood: Mapping[Role, Sequence[str]] = NAMES,
) -> Assignment:
    """The columns of the `wanted` roles; `columns` are those the user named (by role; an empty name leaves the role
    out), `understood` names that roles have. DataError when a `required` one cannot be told.
    """
    for role, name in columns.items():
        if role not in wanted:
            raise DataError(f"--column {role}={name}: expected one of {', '.join(_nameable(wanted))} here")
    if table.bare:
        assignment = _assign_bare(table, columns)
        _check_required(table, assignment.roles, required)
        return assignment
    names = {normalize_name(name): name for name in reversed(table.names)}
    layout = next((one for one in LAYOUTS if one.columns <= names.keys()), None)
    roles: dict[Role, str] = {}
    for role in wanted:
        if role in columns:
            if columns[role]:
                roles[role] = find_column(table, role, columns[role])
            continue
        candidates = [layout.roles[role]] if layout and role in layout.roles else understood.get(role, ())
        taken = {normalize_name(column) for column in roles.values()} if role != "category" else set()
        match = next((name for name in candidates if name in names and name not in taken), None)
        if match is not None:
            roles[role] = names[match]
    kinds = names.get("type") if "label" in wanted and "label" not in {*roles, *columns} else None
    if kinds and all(classify_label(row.cells.get(kinds)) for row in table.rows):  # XSTest's, with fewer columns
        roles["label"] = kinds
    _check_required(table, roles, required)
    return Assignment(roles, table.rows, layout.name if layout else "", layout.join if layout else JOIN)


def _check_required(table: Table, roles: Mapping[Role, str], required: Sequence[Role]) -> None:
    absent = [role for role in required if role not in roles]
    if not absent:
        return
    help_ = f"say which column holds the {absent[0]}s: --column {absent[0]}=NAME"
    columns = f"it has {_list(table.names)}" if table.names else "it has no keys"
    if table.typed:
        where = f"{table.place} {table.unit} {table.rows[0].line}"
        raise DataError(f"{where}: expected an object with {', '.join(required)}; {columns}; {help_}")
    raise DataError(
        f"{table.place} has the columns {_list(table.names)} and no header with one of "
        f"{', '.join(NAMES[absent[0]][:6])}; {help_}"
    )


def _nameable(wanted: Sequence[Role]) -> list[str]:
    return [role for role in wanted if role in ROLES]


def _list(names: Sequence[str]) -> str:
    text = ", ".join(repr(name[:40]) for name in names[:8])
    return text + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def find_column(table: Table, role: str, name: str) -> str:
    """The table's column of that name, or of that number (from 1); DataError when there is none."""
    same = [column for column in table.names if column == name]
    same = same or [column for column in table.names if normalize_name(column) == normalize_name(name)]
    if same:
        return same[0]
    if name.isdecimal() and 1 <= int(name) <= len(table.names):
        return table.names[int(name) - 1]
    raise DataError(f"--column {role}={name}: {table.place} has no such column; it has {_list(table.names)}")


def _assign_bare(table: Table, columns: Mapping[str, str]) -> Assignment:
    """The columns of a table without a header of known names: numbered, and the prompts' one is given or the only one
    beside an index.
    """
    if any(name and not (name.isdecimal() and 1 <= int(name) <= len(table.names)) for name in columns.values()):
        role, name = next((role, name) for role, name in columns.items() if name and name not in table.names)
        first = _list([str(cell) for cell in table.rows[0].cells.values()])
        raise DataError(f"--column {role}={name}: {table.place} has no such column; its first line is {first}")
    values = [list(row.cells.values()) for row in table.rows]
    head = _find_index_head(values)
    if columns.get("prompt"):
        roles: dict[Role, str] = {role: columns[role] for role in ROLES if columns.get(role)}
        if head is not None:
            return Assignment(roles, table.rows[1:], notes=["line 1 stands above an index: a header, left out"])
        return Assignment(roles, table.rows, notes=["no header: the first line is a prompt, as --column says"])
    if len(table.names) == 2 and (head == "" and values[0][1].strip() == "0"):  # as pandas writes one without names
        return Assignment({"prompt": "2"}, table.rows[1:], notes=["a header ',0' and an index, left out"])
    if len(table.names) == 2 and head is None and _is_index(values) and int(values[0][0]) <= 1:
        return Assignment(
            {"prompt": "2"}, table.rows, notes=["no header: each line is an index, left out, and a prompt"]
        )
    if len(table.names) > 1:
        first = f"its line {table.rows[0].line} is {_list(values[0])}"
        way = "if that is a header, say which column holds the prompts with --column prompt=NAME, if not, with "
        way = "say which column holds the prompts: " if head is not None else way
        whole = "; if each line is one prompt, put it in double quotes"
        number = "--column prompt=NAME" if head is not None else f"--column prompt=NUMBER (from 1){whole}"
        raise DataError(
            f"{table.place} has {len(table.names)} columns and no header with one of "
            f"{', '.join(NAMES['prompt'][:6])}; {first}: {way}{number}"
        )
    first, others = values[0][0].strip(), [row[0] for row in values[1:]]
    if first == "0" and others and not others[0].strip().isdecimal():  # what pandas calls a column without a name
        return Assignment({"prompt": "1"}, table.rows[1:], notes=["a header '0', left out"])
    if looks_like_header(first, others, NAMES["prompt"]):
        raise DataError(
            f"{table.place}: its first line, {first[:100]!r}, may be a header or a prompt; say "
            f"--column prompt={first[:100]!r} if it is a header, or --column prompt=1 if it is a prompt"
        )
    prompts, notes = strip_marks([row[0] for row in values])
    rows = (
        [Row(row.line, {"1": prompt}) for row, prompt in zip(table.rows, prompts, strict=True)] if notes else table.rows
    )
    return Assignment({"prompt": "1"}, rows, notes=["no header: each line is a prompt", *notes])


def _find_index_head(values: Sequence[Sequence[str]]) -> str | None:
    """The name above a column of row numbers; None unless the first column is one."""
    head = values[0][0].strip()
    return head if not head.isdecimal() and len(values[0]) > 1 and _is_index(values[1:]) else None


def _is_index(values: Sequence[Sequence[str]]) -> bool:
    return is_index([Line(0, row) for row in values])
