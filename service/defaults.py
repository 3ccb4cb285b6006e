"""A profile's request defaults: which there are, and how they fill what a request leaves out."""

from collections.abc import Mapping
from typing import Annotated, Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import Field, field_validator

from service.validation import StrictModel

Text = Annotated[str, Field(min_length=1, max_length=64 * 1024)]


class Defaults(StrictModel):
    """Request fields that apply where a request sets none itself, in the ranges vLLM accepts."""

    system: Text | None = None
    chat_template: Text | None = None
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    stop: Text | Annotated[list[Text], Field(max_length=64)] | None = None

    @field_validator("chat_template")
    @classmethod
    def _parse_template(cls, text: str | None) -> str | None:
        try:
            ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(text or "")
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"not a valid Jinja template, line {error.lineno}: {error.message}") from error
        return text


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
        turns = merged.get("input" if path.endswith("/responses") else "messages")
        roles = {turn.get("role") for turn in turns if isinstance(turn, dict)} if isinstance(turns, list) else set()
        key = "instructions" if path.endswith("/responses") else "system" if "/v1/messages" in path else ""
        if key:
            if merged.get(key) is None and not roles & {"system", "developer"}:
                merged[key] = system
        elif isinstance(turns, list) and not roles & {"system", "developer"}:
            merged["messages"] = [{"role": "system", "content": system}, *turns]
    return merged
