"""What the routes that say how the server is, and errors, answer: the types of the OpenAPI document."""

from typing import Literal

from pydantic import BaseModel, Field

from service.callers import Role


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


class CallerState(BaseModel):
    """Who sends the request, as its API key says, and what answers it."""

    object: Literal["caller"]
    key: str = Field(description="public id of the API key; empty without one")
    role: Role
    tenant: str = Field(description="empty: the operator's, whose things are public")
    keys: bool = Field(description="whether requests need an API key; else everybody is an admin")
    base: str
    max_model_len: int = Field(description="tokens of prompt and answer together")
    max_weight: float = Field(description="largest absolute value of a weight")


class Residence(BaseModel):
    """A stack or build in the engine."""

    key: str = Field(description="which one, as `x-fusion-stack` says it of the one that routers keep together")
    kind: Literal["stack", "build"]
    rank: int
    requests: int = Field(description="that run on it now, of all fusions that it serves; a tenant's own")


class Evicted(BaseModel):
    """When and why a stack or build was taken out of the engine."""

    at: str = Field(description="in UTC")
    reason: Literal["room", "disk", "gone"] = Field(
        description="another one needed its place (`room`) or the disk's space, or an adapter of it was replaced or "
        "deleted (`gone`)"
    )
    wanted_by: str | None = Field(description="key of what needed its place; for the operator's keys alone")


class FusionStatus(BaseModel):
    """How a profile is doing on this server."""

    object: Literal["fusion.status"]
    name: str
    version: int
    digest: str
    mode: Literal["mixed", "built"]
    state: Literal["warm", "queued", "fusing", "loading", "evicted", "failed", "damaged"] = Field(
        description="`evicted`: made or loaded when it is asked for"
    )
    last_error: str | None = Field(description="why it was not made, or cannot be served")
    residence: Residence | None = Field(description="where it is in the engine; null when it is not")
    pinned: bool = Field(description="whether it stays in the engine while there is other room")
    evicted: Evicted | None = Field(description="why it is not in the engine any more; null when it is, or never was")
    eta_s: float | None = Field(
        description="how long a request would wait for it now, at most, as it took on average until now; 0 when warm, "
        "null when nothing was measured yet"
    )
    last_used: str | None = Field(description="when a request, a tenant's own, last had it on this server, in UTC")
    evidence_age_s: float | None = Field(description="how old its newest scorecard is; null when there is none")


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = Field(description="the key of the request that is at fault")
    code: int = Field(description="the HTTP status")


class ErrorAnswer(BaseModel):
    """The shape of every error."""

    error: ErrorDetail
