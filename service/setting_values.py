"""Settings as text: how each type is read from an environment variable or a TOML file, written and named."""

import shlex
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

_SEPARATORS = {"profiles": ";", "adapters": ",", "groups": ",", "adapter_roots": ":"}
_SEPARATORS |= dict.fromkeys(
    ("base_aliases", "allowed_hosts", "model_forms", "objectives", "sources", "source_networks"), ","
)
_WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_TYPES = {int: "an integer", float: "a number", bool: "a boolean", str: "a string", Path: "a path"}


def parse_value(name: str, kind: Any, raw: Any) -> Any:
    """`raw`, text of a variable or a value of a TOML file, as the field's type; ValueError says what is expected."""
    if get_origin(kind) is tuple:
        if isinstance(raw, str) and name == "engine_args":
            try:
                return tuple(shlex.split(raw))
            except ValueError:
                raise ValueError("flags as on a command line, quotes closed") from None
        if isinstance(raw, str):
            return tuple(part.strip() for part in raw.split(_SEPARATORS[name]) if part.strip())
        if not isinstance(raw, list):
            raise ValueError("a list")
        return tuple(str(part) for part in raw)
    if get_origin(kind) is Literal:
        if raw not in get_args(kind):
            raise ValueError(f"one of {', '.join(get_args(kind))}")
        return raw
    try:
        if isinstance(raw, list | dict):
            raise TypeError
        return _WORDS[str(raw).lower()] if kind is bool else kind(str(raw))
    except (ValueError, KeyError, TypeError):
        raise ValueError("true or false" if kind is bool else _TYPES[kind]) from None


def write_value(name: str, value: Any) -> str:
    """`value` of the setting `name` as the text of its variable."""
    return _SEPARATORS.get(name, " ").join(value) if isinstance(value, tuple) else str(value)


def name_type(kind: Any) -> str:
    """A setting's type in a word, or its values."""
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    return "list" if get_origin(kind) is tuple else _TYPES[kind].partition(" ")[2]
