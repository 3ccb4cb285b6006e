"""Bodies from clients: strict types, no unknown keys, and one plain sentence for the first fault."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

NAME = re.compile(r"[a-z_][a-z0-9_]*|[0-9]+")
"""What a key or an index looks like, unlike pydantic's names for branches."""
BRANCHES = {"string_type": "str", "int_type": "int", "float_type": "float", "bool_type": "bool"}
"""Pydantic's names for branches that look like keys, by the type of the error for a value of another type."""
MAX_QUOTED = 100
"""Characters of a wrong value that an error message repeats."""
MAX_PATH = 16
"""Keys and indices that name a place in a body."""
MAX_MESSAGE = 1000
"""Characters of pydantic's messages, some of which repeat a value."""


class StrictModel(BaseModel):
    """A request body: nothing is coerced, and an unknown key is rejected with the list of known ones."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_keys(cls, body: Any) -> Any:
        if isinstance(body, dict) and (unknown := body.keys() - cls.model_fields.keys()):
            context = {"key": min(unknown, key=str), "known": ", ".join(cls.model_fields)}
            raise PydanticCustomError("unknown_key", "unknown key; known keys are {known}", context)
        return body


def describe_fault(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """The first of pydantic's `errors` as a sentence, and the dotted name of the parameter it is about."""
    first = errors[0]
    # Two levels name a parameter; deeper ones are pydantic's names for the branches of a union.
    path = [str(part)[:MAX_QUOTED] for part in first["loc"][:2]]
    if first["type"] == "unknown_key":
        path.append(str(first["ctx"]["key"])[:MAX_QUOTED])
    if not path:
        return "The request body must be a JSON object.", None
    name, message = ".".join(path), first["msg"].removeprefix("Value error, ")[:MAX_MESSAGE]
    match first["type"]:
        case "missing":
            return f"{name!r} is required.", name
        case "unknown_key":
            return f"{name!r}: {message}.", name
        case "model_type" | "model_attributes_type" | "dict_type":
            message = "Input should be an object"
    value = json.dumps(first["input"], ensure_ascii=False, default=str)[:MAX_QUOTED]
    if message.startswith(("Input should", "String should", "List should")):
        return f"{name!r} should{message.partition('should')[2]}, got {value}.", name
    return f"{name!r}: {message}.", name


def _read_path(error: Mapping[str, Any]) -> list[str]:
    """Keys and indices of the place that one of pydantic's errors is about."""
    path = [part[:MAX_QUOTED] for part in map(str, error["loc"][1:]) if NAME.fullmatch(part)]
    return path[:-1] if path[-1:] == [BRANCHES.get(error["type"])] else path


def describe_union_fault(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """The fault of a body that may have one of several forms, as a sentence; and its parameter.

    pydantic has an error for each form. The one that got deepest into the body is about the form that was meant; of
    several, one that is about more than the type.
    """
    pairs = [(error, _read_path(error)) for error in errors]
    error, path = max(pairs, key=lambda pair: (len(pair[1]), not pair[0]["type"].endswith("_type")))
    cause = error.get("ctx", {}).get("error")
    path = [part[:MAX_QUOTED] for part in path[:MAX_PATH]]
    param = getattr(cause, "parameter", None) or ".".join(path) or None
    message = str(cause.args[0] if getattr(cause, "args", ()) else error["msg"])[:MAX_MESSAGE].removesuffix(".")
    value = json.dumps(error.get("input"), ensure_ascii=False, default=str)[:MAX_QUOTED]
    place = f"{'.'.join(path)!r}: " if path else ""
    return f"{place}{message}{'' if cause else f', got {value}'}.", param
