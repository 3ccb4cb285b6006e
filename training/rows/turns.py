"""The turns of a chat, as trainers and clients write them."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from training.rows.values import has_value, is_missing, shorten
from training.rows.verdicts import find_tags, judge

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("claude", "gemini", "llm"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "tool_result", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
"""Names of roles in the wild, in lower case; a `call` is an assistant turn whose text is a function call in JSON."""
_ROLE_KEYS = ("role", "from", "speaker", "author")
_CONTENT_KEYS = ("content", "value", "text", "message")
_FLAGS = ("weight", "train", "loss", "trainable")
"""Keys that say whether an assistant turn is learned: 1 or true, 0 or false."""
_ROUNDS = {
    **{name: role for name, role in ROLES.items() if role in ("user", "assistant", "system")},
    **dict.fromkeys(("input", "question", "prompt", "instruction", "query"), "user"),
    **dict.fromkeys(("output", "answer", "response", "completion"), "assistant"),
}
"""Keys of an object without a role that holds a question and its answer."""
_PASSED = ("name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
"""Keys that chat templates know."""
_JSON_TURNS = re.compile(r'\s*\[\s*\{\s*"(?:role|from|content|value)"\s*:')
_PYTHON_TURNS = re.compile(r"\s*\[\s*\{\s*'(?:role|from|content|value)'\s*:")
"""Turns in a cell of a table, as JSON and as Python prints them."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_HUMAN_OR_ASSISTANT = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")


@dataclass(slots=True)
class Turn:
    """One turn, its role one of system, user, assistant and tool."""

    role: str
    content: str
    is_learned: bool = True
    extras: dict[str, Any] = field(default_factory=dict)


def read_text(value: object, what: str) -> str:
    """Text as it is, a number or a boolean as JSON writes it; ValueError for anything else."""
    if isinstance(value, bool | int | float) and not is_missing(value):
        return json.dumps(value)
    if not isinstance(value, str):
        raise ValueError(f"{what} is {shorten(value)}: expected a string")
    return value


def read_json(value: object) -> Any:
    """What a string holds when that is a JSON array or object, as in a table's cell; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def read_side(value: object, what: str) -> Any:
    """One side of an exchange: its text, or its turns, which may be JSON in a table's cell.

    ValueError for several texts, which may be alternatives as well as turns, and for an object that is no turn.
    """
    if isinstance(value, str) and _JSON_TURNS.match(value):
        parsed = read_json(value)
        value = parsed if isinstance(parsed, list) and all(map(_is_turn, parsed)) else value
    elif isinstance(value, str) and _PYTHON_TURNS.match(value):
        raise ValueError(f"{what} is {shorten(value)}, turns as Python prints them: save them as JSON or Parquet")
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        if len(value) > 1:
            raise ValueError(f"{what} is a list of {len(value)} texts: expected one text, or turns with roles")
        return value[0]
    if isinstance(value, Mapping) and not value.keys() & {*_ROLE_KEYS, *_ROUNDS}:
        raise ValueError(f"{what} is the object {shorten(value)}: expected a text or turns; write JSON as a string")
    return value


def _is_turn(value: object) -> bool:
    """Whether it is an object with a role that is known and a content; an answer in JSON may look much like one."""
    if not isinstance(value, Mapping):
        return False
    role = next((str(value[key]).strip().lower() for key in _ROLE_KEYS if key in value), "")
    return role in ROLES and any(key in value for key in (*_CONTENT_KEYS, "tool_calls"))


def read_turns(value: object, unused: set[str], *, has_system: bool = False) -> list[Turn]:
    """Turns given as {role, content}, {from, value} or, for plain strings, [user, assistant, user, …], before which
    an odd number of them has the system's if `has_system` says that it may.

    `unused` receives the keys that nothing is made of. ValueError that says what is wrong.
    """
    turns = read_json(value)
    turns = _zip_columns(turns) if isinstance(turns, Mapping) else turns
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"the turns are {shorten(value)}: expected a list of turns")
    if all(isinstance(turn, str) for turn in turns):
        if len(turns) < 2:
            raise ValueError(f"the only turn is {shorten(turns[0])}: expected at least a user and an assistant turn")
        if len(turns) % 2 and not has_system:
            raise ValueError(
                f"the turns are {len(turns)} texts without roles: expected pairs of a question and its answer"
            )
        first = ["system"] if len(turns) % 2 else []
        roles = [*first, *("user", "assistant") * (len(turns) // 2)]
        pairs = zip(roles, turns, strict=True)
        return [Turn(role, text) for role, text in pairs if role != "system" or text.strip()]
    return [read for turn in turns for read in _read_round(turn, unused) or [_read_turn(turn, unused)]]


def _zip_columns(turns: Mapping[str, Any]) -> list[Any]:
    """The turns of {role: [role, …], content: [content, …]}, as Arrow may have them; any other object by itself."""
    lists = [value for value in turns.values() if isinstance(value, list)]
    if len(lists) < 2 or len(lists) < len(turns) or len(set(map(len, lists))) > 1 or not turns.keys() & {*_ROLE_KEYS}:
        return [turns]
    return [dict(zip(turns, values, strict=True)) for values in zip(*lists, strict=True)]


def _read_round(turn: object, unused: set[str]) -> list[Turn]:
    """The turns of {question, answer} or {role: content}; none for a turn that names its role."""
    if not isinstance(turn, Mapping) or any(isinstance(turn.get(key), str) for key in _ROLE_KEYS):
        return []
    roles = {key: _ROUNDS[key.lower()] for key in turn if key.lower() in _ROUNDS and not is_missing(turn[key])}
    if roles:
        unused.update(key for key, value in turn.items() if key not in roles and has_value(value))
    return [Turn(role, _join_parts(turn[key], role)) for key, role in roles.items()]


def _read_turn(turn: object, unused: set[str]) -> Turn:
    if not isinstance(turn, Mapping):
        raise ValueError(f"a turn is {shorten(turn)}: expected an object with role and content")
    keys = {key: value for key, value in turn.items() if not is_missing(value)}
    role_key = next((key for key in _ROLE_KEYS if isinstance(keys.get(key), str)), "role")
    content_key = next((key for key in _CONTENT_KEYS if key in keys), "content")
    name = keys.pop(role_key, None)
    role = ROLES.get(str(name).strip().lower())
    if role is None:
        raise ValueError(f"a turn has role {shorten(name)}: expected system, user, assistant or tool")
    value = keys.pop(content_key, None)
    extras = {key: keys.pop(key) for key in _PASSED if key in keys}
    flags = [_read_flag(key, keys.pop(key)) for key in _FLAGS if key in keys]
    if role in ("assistant", "call"):
        verdicts = {key: judge(key, keys[key], value) for key in find_tags(tuple(keys))}
        keys = {key: one for key, one in keys.items() if verdicts.get(key) is None}
        flags += [verdict for verdict in verdicts.values() if verdict is not None]
    if role == "call":
        role, value, extras = "assistant", *_read_call(value, extras)
    elif "function_call" in keys:  # OpenAI's old form
        extras["tool_calls"] = [{"type": "function", "function": keys.pop("function_call")}]
    if "tool_calls" in extras:
        extras["tool_calls"] = [_read_tool_call(call) for call in _expect_list(extras["tool_calls"])]
    if not extras.get("tool_calls", True):  # an empty list
        del extras["tool_calls"]
    if value is None and keys.get("refusal"):
        value = keys.pop("refusal")
    unused.update(key for key, value in keys.items() if has_value(value))
    if value is None and "tool_calls" in extras:
        value = ""
    return Turn(role, _join_parts(value, role), all(flags), extras)


def _read_flag(key: str, value: object) -> bool:
    text = str(value).strip().lower()
    if text in ("1", "1.0", "true"):
        return True
    if text in ("0", "0.0", "false"):
        return False
    raise ValueError(f"{key} of a turn is {shorten(value)}: expected 0 or 1")


def _read_call(value: object, extras: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(text, extras) of a turn that holds function calls in JSON; the text itself where it does not."""
    parsed = read_json(value)
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        return value, extras
    return "", extras | {"tool_calls": [{"type": "function", "function": call} for call in calls]}


def _read_tool_call(call: object) -> dict[str, Any]:
    """A tool call in OpenAI's form, its arguments as an object, which is what chat templates expect."""
    if not isinstance(call, Mapping):
        raise ValueError(f"a tool call is {shorten(call)}: expected an object")
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"a tool call is {shorten(call)}: expected a function with a name")
    arguments = function.get("arguments", function.get("parameters", {}))
    arguments = {} if arguments in (None, "") else read_json(arguments)
    rest = {key: value for key, value in call.items() if key in ("id", "type") and value is not None}
    return {"type": "function", **rest, "function": {"name": function["name"], "arguments": arguments}}


def _expect_list(value: object) -> list[Any]:
    value = read_json(value)
    if not isinstance(value, list):
        raise ValueError(f"a list of functions is {shorten(value)}: expected a list")
    return value


def _join_parts(value: object, role: str) -> str:
    """The text of content parts, one a line as the server joins them; of anything else, `read_text`."""
    what = f"the content of the {role} turn"
    parts = [value] if isinstance(value, Mapping) else value
    if not isinstance(parts, list):
        return read_text(value, what)
    texts = []
    for part in parts:
        if isinstance(part, Mapping) and part.get("type", "text") in _TEXT_PARTS and "text" in part:
            texts.append(read_text(part["text"], what))
        elif isinstance(part, str):
            texts.append(part)
        elif role == "tool":  # a result that is not text
            return json.dumps(value, ensure_ascii=False, default=str)
        else:
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ValueError(f"{what} has a part of type {shorten(kind)}: expected text")
    return "\n".join(texts)


def read_tools(value: object) -> tuple[dict[str, Any], ...]:
    """The functions that a row offers, in OpenAI's form; they may be JSON in a string, or bare."""
    if is_missing(value) or value == "":
        return ()
    tools = _expect_list(value)
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"the tools are {shorten(value)}: expected objects")
    return tuple(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools)


def read_history(value: object, unused: set[str]) -> list[Turn]:
    """Earlier turns, given as [question, answer] pairs or as turns."""
    rounds = read_json(value)
    if is_missing(rounds) or rounds in ("", []):
        return []
    if isinstance(rounds, list) and all(isinstance(one, list | tuple) and len(one) == 2 for one in rounds):
        what = "a turn of the history"
        pairs = [(read_text(question, what), read_text(answer, what)) for question, answer in rounds]
        return [turn for question, answer in pairs for turn in (Turn("user", question), Turn("assistant", answer))]
    if isinstance(rounds, list) and len(rounds) % 2 and all(isinstance(text, str) for text in rounds):
        raise ValueError(f"the history is a list of {len(rounds)} texts: expected pairs of a question and its answer")
    return read_turns(rounds, unused)


def split_dialogue(text: str) -> list[Turn]:
    """The turns of a text of `Human:` and `Assistant:` paragraphs; none for any other text."""
    return list(_split(text)) if text.lstrip().startswith("Human:") else []


def split_question(text: str) -> list[Turn]:
    """The turns of such a text that ends with `Assistant:`, and so asks for the next; none for any other text."""
    turns = split_dialogue(text) if text.rstrip().endswith("Assistant:") else []
    return turns[:-1] if len(turns) > 1 and not turns[-1].content and turns[-1].role == "assistant" else []


def _split(text: str) -> Iterator[Turn]:
    pieces = _HUMAN_OR_ASSISTANT.split(text.strip())[1:]
    for name, content in zip(pieces[::2], pieces[1::2], strict=True):
        yield Turn(ROLES[name.lower()], content.strip())
