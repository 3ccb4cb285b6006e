"""Read training rows as chats: eight published formats, plain chat JSONL, prompt-answer pairs, hub data sets, and the
built-in data.

Every row remembers where it came from (`file:line`), and every error says so.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters import did_you_mean
from training.builtin.orders import draw_orders
from training.builtin.safety import read_rows
from training.config import SOURCE_HELP
from training.errors import ConfigError

Message = tuple[str, str]
"""(role, content); the roles are system, user and assistant."""


@dataclass(frozen=True, slots=True)
class Chat:
    """One row: its turns, and where it came from."""

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
    """A row format: how to recognize a row, and how to turn it into messages."""

    summary: str
    matches: Callable[[Any], bool]
    to_messages: Callable[[Any], list[Message]]


def _has_columns(*names: str) -> Callable[[Any], bool]:
    return lambda row: isinstance(row, Mapping) and all(name in row for name in names)


def _ask(question: object, context: object, answer: str) -> list[Message]:
    if not isinstance(question, str) or not isinstance(context, str | None):
        wrong = context if isinstance(question, str) else question
        raise ValueError(f"the question is {str(wrong)[:60]!r}: expected a string")
    prompt = f"{question}\n\n{context}" if context is not None and context.strip() else question
    return [("user", prompt), ("assistant", answer)]


def _make_question_format(summary: str, question: str, answer: str, context: str | None = None) -> Format:
    """The format of rows with these columns; that of the context may be missing."""

    def read(row: Any) -> list[Message]:
        return _ask(row[question], None if context is None else row.get(context), row[answer])

    return Format(summary, _has_columns(question, answer), read)


def _ask_for_summary(document: object, summary: str) -> list[Message]:
    if not isinstance(document, str) or not document.strip():
        raise ValueError(f"the document is {str(document)[:60]!r}: expected a non-empty string")
    return _ask("Summarize this article in one sentence.", document, summary)


_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "ai": "assistant"}
_DIALOGUES = ("conversations", "conversation", "dialogue", "dialog")


def _read_turns(turns: Any) -> list[Message]:
    """Turns given as {role, content}, {from, value} or, for plain strings, [system, user, assistant, user, …]."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"the turns are {str(turns)[:60]!r}: expected a list of turns")
    if all(isinstance(turn, str) for turn in turns):
        if len(turns) < 2:
            raise ValueError(f"the only turn is {turns[0][:60]!r}: expected at least a user and an assistant turn")
        first = ["system"] if len(turns) % 2 else []
        roles = [*first, *("user", "assistant") * (len(turns) // 2)]
        return [(role, text) for role, text in zip(roles, turns, strict=True) if role != "system" or text.strip()]
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise ValueError(f"a turn is {str(turn)[:60]!r}: expected an object with role and content")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        messages.append((_ROLES.get(str(role), str(role)), content))
    return messages


FORMATS: Mapping[str, Format] = {
    "chat": Format(
        "{messages: [{role, content}, …]}", _has_columns("messages"), lambda row: _read_turns(row["messages"])
    ),
    "pure_bad": Format("as chat", _has_columns("messages"), lambda row: _read_turns(row["messages"])),
    "aoa": Format("lists of [system, user, assistant]", lambda row: isinstance(row, list), _read_turns),
    "aoa_safety": Format("as aoa", lambda row: isinstance(row, list), _read_turns),
    "chatagi": Format(
        "{conversations: [{from, value}, …]}, or dialogue",
        lambda row: isinstance(row, Mapping) and any(name in row for name in _DIALOGUES),
        lambda row: _read_turns(next(row[name] for name in _DIALOGUES if name in row)),
    ),
    "dolly": _make_question_format("{instruction, context, response, category}", "instruction", "response", "context"),
    "alpaca": _make_question_format("{instruction, input, output}", "instruction", "output", "input"),
    "hpfa": _make_question_format("{question, answer}", "question", "answer"),
    "xsum": Format(
        "{document, summary, id}",
        _has_columns("document", "summary"),
        lambda row: _ask_for_summary(row["document"], row["summary"]),
    ),
    "pairs": _make_question_format("{prompt, answer}", "prompt", "answer"),
}


def read_chats(path: str, *, format: str = "auto", split: str = "train", seed: int = 0) -> list[Chat]:
    """All rows of a source: a JSON, JSONL or CSV file, `hub:NAME`, `orders:N`, `safety:train` or `safety:heldout`.

    `auto` recognizes the format of each row by its columns. `split` applies to the hub, `seed` to orders. ConfigError,
    with file and line, for a file that is missing, empty or malformed and for a row that does not match the format.
    """
    if format != "auto" and format not in FORMATS:
        hint = did_you_mean(format, FORMATS) or f"expected auto or one of {', '.join(FORMATS)}"
        raise ConfigError(f"data.format is {format!r}: {hint}")
    if path.startswith(("orders:", "safety:")):
        return _read_builtin(path, seed)
    rows = _read_hub(path.removeprefix("hub:"), split) if path.startswith("hub:") else _read_file(Path(path))
    chats = [_to_chat(row, where, format) for where, row in rows]
    if not chats:
        raise ConfigError(f"{path!r} has no rows: expected at least one")
    return chats


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


def _to_chat(row: Any, where: str, name: str) -> Chat:
    if name == "auto":
        name = next((known for known, one in FORMATS.items() if one.matches(row)), "")
        if not name:
            shapes = "; ".join(f"{known}: {one.summary}" for known, one in FORMATS.items())
            raise ConfigError(f"{where} has {_describe(row)}, which matches no known format: expected one of {shapes}")
    elif not FORMATS[name].matches(row):
        raise ConfigError(f"{where} has {_describe(row)}: format {name!r} expects {FORMATS[name].summary}")
    try:
        messages = FORMATS[name].to_messages(row)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{where}: {error}") from None
    for role, content in messages:
        if role not in ("system", "user", "assistant"):
            raise ConfigError(f"{where} has a turn with role {role!r}: expected system, user or assistant")
        if not isinstance(content, str):
            raise ConfigError(f"{where}: the content of the {role} turn is {str(content)[:60]!r}: expected a string")
        try:
            content.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{where}: the {role} turn has half a surrogate pair: expected valid Unicode") from None
    roles = [role for role, _ in messages]
    if "user" not in roles or roles[-1] != "assistant":
        raise ConfigError(f"{where} has the turns {', '.join(roles)}: expected a user turn, and an assistant turn last")
    return Chat(tuple(messages), where)


def _describe(row: Any) -> str:
    if isinstance(row, Mapping):
        return f"the columns {', '.join(map(repr, list(row)[:12])) or '(none)'}"
    return f"{str(row)[:60]!r}"


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
        yield f"{name}:{i}", dict(row)


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise ConfigError(f"there is no file {str(path)!r}: expected {SOURCE_HELP}")
    if path.suffix == ".csv":
        yield from _read_csv(path)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name} is not valid UTF-8: {error}") from None
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path.name} is not valid JSON: {error}") from None
        for i, row in enumerate(rows, 1):
            yield f"{path.name}:[{i}]", row
        return
    # Not splitlines: JSON strings may contain other line separators, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path.name}:{number} is not valid JSON: {error}") from None
            yield f"{path.name}:{number}", row


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        try:
            reader = csv.DictReader(stream, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise ConfigError(f"{path.name}:{reader.line_num} does not have as many fields as the header")
                yield f"{path.name}:{reader.line_num}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigError(f"{path.name} is not valid CSV: {error}") from None
