"""Bodies from clients: strict types, no unknown keys, and one plain sentence for the first fault."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

MAX_QUOTED = 100
"""Characters of a wrong value that an error message repeats."""


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
    path = [str(part) for part in first["loc"][:2]]
    if first["type"] == "unknown_key":
        path.append(str(first["ctx"]["key"]))
    if not path:
        return "The request body must be a JSON object.", None
    name, message = ".".join(path), first["msg"].removeprefix("Value error, ")
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
