"""Read training rows as chats: eight published formats, plain chat JSONL, prompt-answer pairs, hub data sets.

Every row remembers where it came from (`file:line`), and every error says it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.builtin.orders import orders
from training.config import ConfigError

Message = tuple[str, str]
"""(role, content); the roles are system, user and assistant."""


@dataclass(frozen=True, slots=True)
class Chat:
    """One row."""

    messages: tuple[Message, ...]
    where: str

    @property
    def answer(self) -> str:
        """The last assistant turn."""
        return self.messages[-1][1]

    @property
    def prompt(self) -> str:
        """The last user turn."""
        return next(content for role, content in reversed(self.messages) if role == "user")


@dataclass(frozen=True, slots=True)
class Format:
    """A way to write rows: which columns tell it, and how a row becomes messages."""

    summary: str
    fits: Callable[[Any], bool]
    messages: Callable[[Any], list[Message]]


def _columns(*names: str) -> Callable[[Any], bool]:
    return lambda row: isinstance(row, Mapping) and all(name in row for name in names)


def _asked(question: object, context: object, answer: str) -> list[Message]:
    if not isinstance(question, str) or not isinstance(context, str | None):
        wrong = context if isinstance(question, str) else question
        raise ValueError(f"the question holds {str(wrong)[:60]!r}: expected a text")
    whole = f"{question}\n\n{context}" if context is not None and context.strip() else question
    return [("user", whole), ("assistant", answer)]


def _summary(document: object, summary: str) -> list[Message]:
    if not isinstance(document, str) or not document.strip():
        raise ValueError(f"the document is {str(document)[:60]!r}: expected a text")
    return _asked("Summarize this article in one sentence.", document, summary)


_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "ai": "assistant"}
_DIALOGUES = ("conversations", "conversation", "dialogue", "dialog")


def _turns(turns: Any) -> list[Message]:
    """Turns as {role, content}, {from, value} or, for plain texts, [system, user, assistant, user, …]."""
    if not isinstance(turns, list) or not turns:
        raise ValueError("expected a list of turns")
    if all(isinstance(turn, str) for turn in turns):
        if len(turns) < 2:
            raise ValueError("expected at least a user and an assistant turn")
        first = ["system"] if len(turns) % 2 else []
        roles = [*first, *("user", "assistant") * (len(turns) // 2)]
        return [(role, text) for role, text in zip(roles, turns, strict=True) if role != "system" or text.strip()]
    found = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise ValueError(f"a turn is {str(turn)[:60]!r}")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        found.append((_ROLES.get(str(role), str(role)), content))
    return found


FORMATS: Mapping[str, Format] = {
    "chat": Format("{messages: [{role, content}, …]}", _columns("messages"), lambda row: _turns(row["messages"])),
    "pure_bad": Format("as chat", _columns("messages"), lambda row: _turns(row["messages"])),
    "aoa": Format("lists of [system, user, assistant]", lambda row: isinstance(row, list), _turns),
    "aoa_safety": Format("as aoa", lambda row: isinstance(row, list), _turns),
    "chatagi": Format(
        "{conversations: [{from, value}, …]}, or dialogue",
        lambda row: isinstance(row, Mapping) and any(name in row for name in _DIALOGUES),
        lambda row: _turns(next(row[name] for name in _DIALOGUES if name in row)),
    ),
    "dolly": Format(
        "{instruction, context, response, category}",
        _columns("instruction", "response"),
        lambda row: _asked(row["instruction"], row.get("context"), row["response"]),
    ),
    "alpaca": Format(
        "{instruction, input, output}",
        _columns("instruction", "output"),
        lambda row: _asked(row["instruction"], row.get("input"), row["output"]),
    ),
    "hpfa": Format(
        "{question, answer}",
        _columns("question", "answer"),
        lambda row: _asked(row["question"], None, row["answer"]),
    ),
    "xsum": Format(
        "{document, summary, id}",
        _columns("document", "summary"),
        lambda row: _summary(row["document"], row["summary"]),
    ),
    "pairs": Format(
        "{prompt, answer}",
        _columns("prompt", "answer"),
        lambda row: _asked(row["prompt"], None, row["answer"]),
    ),
}


def read(path: str, *, format: str = "auto", split: str = "train", seed: int = 0) -> list[Chat]:
    """All rows of a source: a JSON, JSONL or CSV file, `hub:NAME`, or `orders:N`.

    ConfigError, with file and line, for a file that is missing, empty or broken and for a row that is not of
    the format; `auto` tells the format of each row by its columns.
    """
    if format != "auto" and format not in FORMATS:
        raise ConfigError(f"data.format is {format!r}: expected auto or one of {', '.join(FORMATS)}")
    if path.startswith("orders:"):
        count = path.removeprefix("orders:")
        if not count.isdecimal() or int(count) < 1:
            raise ConfigError(f"data.path is {path!r}: expected a number of rows, such as orders:960")
        made = orders(int(count), seed=seed)
        return [Chat((("user", row.prompt), ("assistant", row.answer)), f"orders:{i}") for i, row in enumerate(made, 1)]
    rows = _hub(path.removeprefix("hub:"), split) if path.startswith("hub:") else _file(Path(path))
    found = [_chat(row, where, format) for where, row in rows]
    if not found:
        raise ConfigError(f"{path!r} has no rows")
    return found


def _chat(row: Any, where: str, name: str) -> Chat:
    if name == "auto":
        name = next((known for known, one in FORMATS.items() if one.fits(row)), "")
        if not name:
            shapes = "; ".join(f"{known}: {one.summary}" for known, one in FORMATS.items())
            raise ConfigError(f"{where} has {_seen(row)}, which no known format has: expected one of {shapes}")
    elif not FORMATS[name].fits(row):
        raise ConfigError(f"{where} has {_seen(row)}: format {name!r} expects {FORMATS[name].summary}")
    try:
        messages = FORMATS[name].messages(row)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{where}: {error}") from None
    for role, content in messages:
        if role not in ("system", "user", "assistant"):
            raise ConfigError(f"{where} has a turn of role {role!r}: expected system, user or assistant")
        if not isinstance(content, str):
            raise ConfigError(f"{where} has a {role} turn that is {str(content)[:60]!r}: expected a text")
        try:
            content.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{where} has half a surrogate pair in its {role} turn: it is no Unicode text") from None
    roles = [role for role, _ in messages]
    if "user" not in roles or roles[-1] != "assistant":
        raise ConfigError(f"{where} has the turns {', '.join(roles)}: expected a user's and, last, an assistant's")
    return Chat(tuple(messages), where)


def _seen(row: Any) -> str:
    if isinstance(row, Mapping):
        return f"the columns {', '.join(map(repr, list(row)[:12])) or '(none)'}"
    return f"{str(row)[:60]!r}"


def _hub(name: str, split: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"data.path 'hub:{name}' needs the package datasets: pip install datasets") from None
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # of many types: no such set, no such split, no network
        raise ConfigError(f"the data set {name!r} (split {split!r}) cannot be read: {error}") from error
    for i, row in enumerate(rows):
        yield f"{name}:{i}", dict(row)


def _file(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise ConfigError(f"there is no file {str(path)!r}: check data.path")
    if path.suffix == ".csv":
        yield from _csv(path)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name} is not UTF-8 text: {error}") from None
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path.name} is not JSON: {error}") from None
        for i, row in enumerate(rows, 1):
            yield f"{path.name}:[{i}]", row
        return
    for number, line in enumerate(text.split("\n"), 1):  # a JSON text may hold other line ends (U+2028) as they are
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path.name}:{number} is not JSON: {error}") from None
            yield f"{path.name}:{number}", row


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        try:
            reader = csv.DictReader(stream, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise ConfigError(f"{path.name}:{reader.line_num} has not as many fields as the header")
                yield f"{path.name}:{reader.line_num}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigError(f"{path.name} is not CSV: {error}") from None
