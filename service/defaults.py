"""A profile's request defaults: what they may be, and how they fill a request that is silent."""

from collections.abc import Mapping
from typing import Annotated, Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from service.errors import ApiError

Text = Annotated[str, Field(min_length=1, max_length=64 * 1024)]


class Defaults(BaseModel):
    """The keys of `defaults`, with the ranges vLLM takes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    system: Text | None = None
    chat_template: Text | None = None
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    stop: Text | Annotated[list[Text], Field(max_length=64)] | None = None

    @field_validator("chat_template")
    @classmethod
    def _is_a_template(cls, text: str | None) -> str | None:
        try:
            ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(text or "")
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"no Jinja template, line {error.lineno}: {error.message}") from error
        return text


def check_defaults(given: object) -> dict[str, Any]:
    """`given` as a profile keeps it, without nulls; 400 naming the key that is wrong."""
    try:
        return Defaults.model_validate(given or {}).model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(["defaults", *(str(part) for part in first["loc"][:1])])
        known = ", ".join(Defaults.model_fields)
        hint = f"; known keys are {known}" if first["type"] == "extra_forbidden" else ""
        raise ApiError(400, f"{where!r}: {first['msg']}{hint}.", param=where) from error


def with_defaults(body: dict[str, Any], defaults: Mapping[str, Any], path: str) -> dict[str, Any]:
    """`body` with a profile's request defaults where the request says nothing itself.

    The chat template is not among them: it reaches vLLM beside the body (`Served.chat_template`).
    """
    merged = dict(body)
    for key in ("temperature", "top_p"):
        if key in defaults and merged.get(key) is None:
            merged[key] = defaults[key]
    stop = "stop_sequences" if path.endswith("/v1/messages") else "stop"
    if "stop" in defaults and merged.get(stop) is None:
        given = defaults["stop"]
        merged[stop] = [given] if stop == "stop_sequences" and isinstance(given, str) else given
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
