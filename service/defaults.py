"""A profile's request defaults: which there are, and how they fill what a request leaves out."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from service.validation import StrictModel

Text = Annotated[str, Field(min_length=1, max_length=64 * 1024)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]


class Defaults(StrictModel):
    """Request fields that apply where a request sets none itself, in the ranges vLLM accepts."""

    system: Text | None = None
    chat_template: Text | None = None
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=64)] | None = None


def with_defaults(body: dict[str, Any], defaults: Mapping[str, Any], path: str) -> dict[str, Any]:
    """`body` with a profile's `defaults` for the fields it leaves out; `path` decides what those are called.

    The chat template is not among them: it reaches vLLM outside the body (`ServedModel.chat_template`).
    """
    merged = dict(body)
    for key in ("temperature", "top_p"):
        if key in defaults and merged.get(key) is None:
            merged[key] = defaults[key]
    stop = "stop_sequences" if path.endswith("/v1/messages") else "stop"
    if "stop" in defaults and merged.get(stop) is None:
        value = defaults["stop"]
        merged[stop] = [value] if stop == "stop_sequences" and isinstance(value, str) else value
    limit = "max_output_tokens" if path.endswith("/responses") else "max_tokens"
    if "max_tokens" in defaults and all(merged.get(k) is None for k in (limit, "max_completion_tokens")):
        merged[limit] = defaults["max_tokens"]
    if system := defaults.get("system"):
        _add_system(merged, system, path)
    return merged


def _add_system(body: dict[str, Any], system: str, path: str) -> None:
    """Give a body its system turn, as its route spells it, where it has neither a system nor a developer turn."""
    if path.endswith("/responses"):
        _add_turn(body, system)
        return
    turns = body.get("messages")
    if "/v1/messages" in path:
        if body.get("system") is None and not _has_system(turns):
            body["system"] = system
    elif isinstance(turns, list):
        turn = {"role": "system", "content": system}
        if path.endswith("/batch"):  # a list of conversations
            body["messages"] = [
                [turn, *one] if isinstance(one, list) and not _has_system(one) else one for one in turns
            ]
        elif not _has_system(turns):
            body["messages"] = [turn, *turns]


def _add_turn(body: dict[str, Any], system: str) -> None:
    """As a turn: `instructions` would be in the answer, which not everybody may see. What an answer before this one
    was asked with has the turn.
    """
    turns = body.get("input")
    is_first = body.get("instructions") is None and body.get("previous_response_id") is None
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if is_first and isinstance(turns, list) and not _has_system(turns):
        body["input"] = [{"role": "system", "content": system}, *turns]


def _has_system(turns: Any) -> bool:
    roles = [turn.get("role") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return "system" in roles or "developer" in roles
