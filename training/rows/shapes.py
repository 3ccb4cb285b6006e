"""From a raw row to a chat, and what becomes of each column."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from training.rows.chats import Chat
from training.rows.formats import FORMATS, TURNS, Format, normalize
from training.rows.turns import (
    Turn,
    read_history,
    read_json,
    read_side,
    read_text,
    read_tools,
    read_turns,
    split_dialogue,
    split_question,
)
from training.rows.values import has_value, is_missing, is_void, shorten
from training.rows.verdicts import RejectedRowError, find_tags, judge, reject


@dataclass(slots=True)
class Ledger:
    """What became of the rows and columns of a source."""

    used: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Rows by (column, part)."""
    unused: Counter[str] = field(default_factory=Counter)
    """Rows by column, or key of a turn, that has a value which nothing is made of."""
    silent: list[str] = field(default_factory=list)
    """Rows with an empty answer before the last."""
    blank: list[str] = field(default_factory=list)
    """Rows with an empty question."""
    left_out: list[str] = field(default_factory=list)
    """`file:line` and reason of the rows that are no chats, and of those that are rejected."""
    rejected: list[str] = field(default_factory=list)
    """Those among `left_out` that say that their answer is a bad one."""
    notes: list[str] = field(default_factory=list)
    """What else the user should know."""

    def leave_out(self, where: str, error: Exception) -> None:
        """Note the row at `where` as left out for this reason."""
        reason = str(error)
        row = f"{where} {reason}" if reason.startswith(("has ", "is ", "does ")) else f"{where}: {reason}"
        self.left_out.append(row)
        if isinstance(error, RejectedRowError):
            self.rejected.append(row)


@dataclass(frozen=True, slots=True)
class Shape:
    """How rows become chats: by the format of this name, or the one that a row's columns match (auto)."""

    name: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    """Column of a part, in place of those that the format knows; empty: none."""

    def is_row(self, row: Any) -> bool:
        """Whether the row's columns match a format."""
        return self._match(row) is not None

    def read(self, row: Any, where: str, ledger: Ledger) -> Chat:
        """The row as a chat, noted in the ledger; ValueError that says why it is none."""
        match = self._match(row)
        if match is None:
            raise ValueError(self._explain(row))
        format, assigned = match
        row = {TURNS: row} if isinstance(row, list) else row
        judging = self._judge(row, assigned)
        unused: set[str] = set()
        turns = _read_turns(format, {part: row[column] for part, column in assigned.items()}, assigned, unused)
        tools = read_tools(row[assigned["tools"]]) if "tools" in assigned else ()
        _check(turns, tools)
        silent = {
            i for i, turn in enumerate(turns[:-1])
            if turn.role == "assistant" and not turn.content.strip() and "tool_calls" not in turn.extras
        }  # fmt: skip
        muted = silent | {i for i, turn in enumerate(turns) if turn.role == "assistant" and not turn.is_learned}
        if silent:
            ledger.silent.append(where)
        if any(turn.role == "user" and not turn.content.strip() for turn in turns):
            ledger.blank.append(where)
        ledger.used.update({(column, part) for part, column in assigned.items()} | {(c, "label") for c in judging})
        others = row.keys() - assigned.values() - judging
        ledger.unused.update(unused | {str(column) for column in others if has_value(row[column])})
        messages = tuple((turn.role, turn.content) for turn in turns)
        extras = {i: turn.extras for i, turn in enumerate(turns) if turn.extras}
        return Chat(messages, where, frozenset(muted), extras, tools)

    def list_tags(self, row: Any) -> tuple[str, ...]:
        """The columns of a row that say, or may say, whether its answer is one to learn."""
        tags = find_tags(tuple(row)) if isinstance(row, Mapping) else ()
        match = self._match(row) if tags or "label" in self.columns else None
        if match is None:
            return ()
        if "label" in self.columns:
            return tuple(column for part, column in match[1].items() if part == "label")
        parts = {column for part, column in match[1].items() if part != "label"}
        return tuple(column for column in tags if column not in parts)

    def _judge(self, row: Any, assigned: Mapping[str, str]) -> set[str]:
        """The columns that accept the answer; RejectedRowError when one rejects it."""
        answer = row[assigned["answer"]] if "answer" in assigned else None
        accepting: set[str] = set()
        for column in self.list_tags(row):
            verdict = judge(column, row[column], answer, is_named="label" in self.columns)
            if verdict is False:
                raise reject(column, row[column])
            accepting |= {column} if verdict else set()
        return accepting

    def _match(self, row: Any) -> tuple[Format, dict[str, str]] | None:
        """The row's format and the column of each part: the first format that has a value for all that it requires."""
        if isinstance(row, list):
            row = {TURNS: row}
        if not isinstance(row, Mapping):
            return None
        matches = _list_matches(tuple(row), self.name, tuple(self.columns.items()))
        for format, assigned in matches:
            if not any(is_missing(row[assigned[part]]) for part in format.parts) and not _is_judged(row, assigned):
                return format, dict(assigned)
        rest = [(format, assigned) for format, assigned in matches if not _is_judged(row, assigned)]
        return (rest[0][0], dict(rest[0][1])) if rest else None

    def _explain(self, row: Any) -> str:
        """Why no format matches."""
        if isinstance(row, Mapping):
            columns = f"the columns {', '.join(repr(str(column)[:60]) for column in list(row)[:12]) or '(none)'}"
        else:
            columns = shorten(row)
        if self.columns:
            return f"has {columns}: data.columns expects {', '.join(map(repr, filter(None, self.columns.values())))}"
        if self.name != "auto":
            return f"has {columns}: format {self.name!r} expects {FORMATS[self.name].summary}"
        known = "; ".join(f"{name}: {one.summary}" for name, one in FORMATS.items())
        return (
            f"has {columns}, which matches no known format: name them with --columns prompt=…,answer=…, "
            f"or expected one of {known}"
        )


def _is_judged(row: Mapping[str, Any], assigned: Mapping[str, str]) -> bool:
    """Whether `chosen` and `rejected` say what became of an answer, and are no answers."""
    return "rejected" in assigned and isinstance(row[assigned["answer"]], bool)


@lru_cache(maxsize=256)
def _list_matches(
    row: tuple[str, ...], name: str, columns: tuple[tuple[str, str], ...]
) -> list[tuple[Format, Mapping[str, str]]]:
    """The formats that the columns of a row match, each with the column of its parts."""
    chosen = dict(columns)
    candidates: Iterable[str] = FORMATS
    if name != "auto":
        candidates = (name,)
    elif "messages" in chosen:
        candidates = ("chat",)
    elif {"prompt", "answer"} & chosen.keys():
        candidates = ("pairs",)
    names = {normalize(column): column for column in reversed(row)} | {column: column for column in row}
    named = {part: names.get(column, names.get(normalize(column))) for part, column in columns if column}
    matches: list[tuple[Format, Mapping[str, str]]] = []
    for format in (FORMATS[candidate] for candidate in candidates):
        assigned: dict[str, str] = {}
        free = [column for column in row if column not in named.values()]
        for part, alternatives in {**format.parts, **format.optional, **dict.fromkeys(chosen, ())}.items():
            column = named.get(part)
            if part not in chosen:
                column = next((names[one] for one in alternatives if names.get(one) in free), None)
            if column is not None:
                assigned[part] = column
                free = [one for one in free if one != column]
        if format.parts.keys() <= assigned.keys():
            matches.append((format, assigned))
    return matches


def _read_turns(format: Format, values: Mapping[str, Any], assigned: dict[str, str], unused: set[str]) -> list[Turn]:
    """The turns of a row by the values of its parts; parts that are not used after all are taken out of `assigned`."""
    keys: set[str] = set()
    assigned.pop("rejected", None)
    assigned.pop("label", None)  # judged before
    if "answer" in values:
        turns = _read_exchange(format, values, assigned, keys)
        column = assigned["answer"]
    else:
        if "context" in values:
            raise ValueError("messages take no context: name its column as system, or name prompt and answer")
        turns = read_turns(values["messages"], keys, has_system=assigned["messages"] == TURNS)
        column = assigned["messages"]
    unused.update(f"{column}[].{key}" for key in keys)
    turns = [*read_history(values.get("history"), unused), *turns]
    system = values.get("system")
    text = "" if is_void(system) else read_text(system, "the system turn")
    if text.strip():
        if turns[0].role != "system":
            turns.insert(0, Turn("system", text))
        elif turns[0].content != text:
            turns[0].content = f"{text}\n\n{turns[0].content}"
    return turns


def _read_exchange(format: Format, values: Mapping[str, Any], assigned: dict[str, str], keys: set[str]) -> list[Turn]:
    """The prompt, which is not learned, and the answer; each as text or as turns."""
    answer, prompt = values["answer"], values.get("prompt")
    if "prompt" in values or "messages" in values:  # else a list of texts is a chat
        answer, prompt = read_side(answer, "the answer"), read_side(prompt, "the question")
    if isinstance(answer, list | Mapping):
        turns = read_turns(answer, keys)
    else:
        text = read_text(answer, "the content of the assistant turn")
        turns = ("prompt" not in values and split_dialogue(text)) or [Turn("assistant", text)]
    if any(turn.role == "user" for turn in turns):  # the whole chat
        for part in ("prompt", "messages", "context"):
            assigned.pop(part, None)
        return turns
    if "messages" in values and not is_missing(values["messages"]):
        for part in ("prompt", "context"):
            assigned.pop(part, None)
        prompt = read_json(values["messages"])
    if isinstance(prompt, list | Mapping):
        asked = read_turns(prompt, keys)
        for turn in asked:
            turn.is_learned = False
    else:
        if format.question and (not isinstance(prompt, str) or not prompt.strip()):
            raise ValueError(f"the document is {shorten(prompt)}: expected a non-empty string")
        text = read_text(prompt, "the question")
        asked = split_question(text) or [Turn("user", text)]
        for turn in asked:
            turn.is_learned = False
    context = values.get("context") if "context" in assigned else None
    added = "" if is_void(context) else read_text(context, "the question")
    last = asked[-1]
    if format.question:
        last.content = f"{format.question}\n\n{last.content}"
    if added.strip():
        last.content = f"{last.content}\n\n{added}" if last.content.strip() else added
    return [*asked, *turns]


def _check(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> None:
    """ValueError unless the turns ask and end with an answer, in Unicode that can be encoded."""
    for turn in turns:
        if not _is_encodable(turn.content) or not _is_encodable(turn.extras):
            raise ValueError(f"the {turn.role} turn has half a surrogate pair: expected valid Unicode")
    if not _is_encodable(tools):
        raise ValueError("the tools have half a surrogate pair: expected valid Unicode")
    roles = [turn.role for turn in turns]
    names = ", ".join([*roles[:12], *["…"] * (len(roles) > 12)])
    if "user" not in roles or roles[-1] != "assistant":
        raise ValueError(f"has the turns {names}: expected a user turn, and an assistant turn last")
    if roles[0] == "assistant":
        raise ValueError(f"has the turns {names}: expected a system or user turn first")


def _is_encodable(value: object) -> bool:
    if not value:
        return True
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
