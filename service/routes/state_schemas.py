"""What the routes that say how the server is, and errors, answer: the types of the OpenAPI document."""

from typing import Literal

from pydantic import BaseModel, Field


class Mixing(BaseModel):
    """What the proof at startup found."""

    proven: bool = Field(description="whether weights act in the engine as they should; else sums are built")
    reason: str
    error: float
    effect: float
    tables: bool = Field(description="whether weights may differ by module and rank component; else such are built")
    phases: bool = Field(description="whether weights may change with position; else such are refused")
    limits: str = Field(description="why one of them may not")


class Nonfinite(BaseModel):
    """Requests that were ended because their numbers overflowed."""

    requests: int = Field(description="how many since the engine started")
    last: str | None = Field(description="when the last one was, in UTC")


class RegistryState(BaseModel):
    """Whether names stand for what the registry's database says; else for what it said last, and nothing changes."""

    current: bool
    since: str = Field(default="", description="when the database stopped to answer, in UTC")
    reason: str = Field(default="", description="how it fails")


class AccessState(BaseModel):
    """Who may send requests."""

    keys: bool = Field(description="whether requests need an API key; else everybody may do everything")
    loopback_only: bool = Field(description="whether, without a key, loopback addresses alone are answered")


class Readiness(BaseModel):
    """Whether requests are answered."""

    ready: bool
    state: Literal["starting", "restarting", "stopping", "ended"] | None = Field(
        default=None, description="when not ready"
    )
    reason: str = Field(default="", description="when not ready")
    mixing: Mixing | None = Field(default=None, description="when ready")
    nonfinite: Nonfinite | None = Field(default=None, description="when ready")
    registry: RegistryState | None = Field(default=None, description="when ready")
    access: AccessState | None = Field(default=None, description="when ready")


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = Field(description="the key of the request that is at fault")
    code: int = Field(description="the HTTP status")


class ErrorAnswer(BaseModel):
    """The shape of every error."""

    error: ErrorDetail
