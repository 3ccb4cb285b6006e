"""The row formats: a table of which columns make which part of a chat."""

from collections.abc import Mapping
from dataclasses import dataclass, field

_QUESTIONS = ("prompt", "question", "query", "instruction", "problem", "user", "human", "input", "inputs")
_ANSWERS = ("answer", "completion", "response", "output", "solution", "assistant", "target", "targets")
_DIALOGUES = ("conversations", "conversation", "dialogue", "dialog", "turns")
_OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "context": ("context", "input"),
    "system": ("system", "system_prompt", "system_message"),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "label": ("label", "kto_tag"),
}
"""Parts that any row may have, with the columns that they come from."""
TURNS = "(turns)"
"""Stands for the column of a row that is itself a list of turns."""


@dataclass(frozen=True, slots=True)
class Format:
    """A row format: the columns of its parts, the first that a row has; all these parts are required."""

    summary: str
    parts: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _OPTIONAL)
    question: str = ""
    """What is asked about the prompt, where that is a document."""


_CHAT: Mapping[str, tuple[str, ...]] = {
    key: value for key, value in _OPTIONAL.items() if key not in ("context", "history")
}
FORMATS: Mapping[str, Format] = {
    "preference": Format(
        "{prompt, chosen, rejected}: chosen is learned",
        {"answer": ("chosen",), "rejected": ("rejected",)},
        {"prompt": _QUESTIONS, "messages": ("messages", *_DIALOGUES), **_OPTIONAL},
    ),
    "chat": Format("{messages: [{role, content}, …]}", {"messages": ("messages",)}, _CHAT),
    "pure_bad": Format("as chat", {"messages": ("messages",)}, _CHAT),
    "aoa": Format("lists of [system, user, assistant]", {"messages": (TURNS,)}),
    "aoa_safety": Format("as aoa", {"messages": (TURNS,)}),
    "chatagi": Format("{conversations: [{from, value}, …]}, or dialogue", {"messages": _DIALOGUES}, _CHAT),
    "dolly": Format(
        "{instruction, context, response, category}", {"prompt": ("instruction",), "answer": ("response",)}
    ),
    "alpaca": Format(
        "{instruction, input, output}",
        {"prompt": ("instruction",), "answer": ("output",)},
        {**_OPTIONAL, "context": ("input", "context")},
    ),
    "hpfa": Format("{question, answer}", {"prompt": ("question",), "answer": ("answer",)}),
    "xsum": Format(
        "{document, summary, id}",
        {"prompt": ("document",), "answer": ("summary",)},
        _CHAT,
        "Summarize this article in one sentence.",
    ),
    "pairs": Format(
        "{prompt, answer}, or question, query, problem, input, … and completion, response, output, …; as text or turns",
        {"prompt": _QUESTIONS, "answer": _ANSWERS},
    ),
}


def normalize(column: object) -> str:
    """A column's name for comparison: spaces and case do not matter."""
    return "_".join(str(column).lower().split())
