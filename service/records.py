"""What the registry keeps of adapters and profile versions, and how it is read back: a bad row is no record."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from adapters import AdapterError, Readout, Recipe, RecipeError, check_name, parse
from service.tenants import check_tenant, join_key, split_key
from service.validation import describe_fault

HexDigest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

WEIGHT_LOW, WEIGHT_HIGH = "weight_low", "weight_high"
"""What a record holds of a recommended range: two numbers, for servers of earlier versions take no list."""


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A registered adapter of a tenant, "" for a public one; its files lie in the store under `digest`."""

    name: str
    digest: str
    info: Mapping[str, Any]
    created: str
    tenant: str = ""

    @property
    def key(self) -> str:
        """Its registered name."""
        return join_key(self.tenant, self.name)

    @property
    def rank(self) -> int:
        """The adapter's largest rank in any module."""
        return int(self.info["rank"])

    @property
    def norm(self) -> float:
        """Bound of the adapter's update (see `norms`); 0 in records from before it was measured."""
        return float(self.info.get("norm", 0.0))

    @property
    def answer_only(self) -> bool:
        """Whether it acts on the answer alone, so that no recipe may give it a weight on the prompt."""
        return bool(self.info.get("answer_only", False))

    @property
    def weight_range(self) -> tuple[float, float] | None:
        """The lowest and the highest weight that are recommended; None when nobody has said."""
        low, high = self.info.get(WEIGHT_LOW), self.info.get(WEIGHT_HIGH)
        return None if low is None or high is None else (float(low), float(high))

    @property
    def recipe(self) -> Recipe:
        """What its name stands for: the adapter alone, where it acts."""
        return replace(Recipe.single(self.name), answer=self.answer_only)

    @property
    def built(self) -> str:
        """Its layers that are served built, not mixed, for messages; empty when it has none."""
        return str(self.info.get("built", ""))

    @property
    def gate(self) -> str:
        """How its value is read, as JSON text, when it is a gate; else empty."""
        return str(self.info.get("gate", ""))


@dataclass(frozen=True, slots=True)
class ProfileVersion:
    """One version of a tenant's profile: canonical recipe with its parents pinned by digest, and defaults."""

    name: str
    version: int
    recipe: str
    parents: Mapping[str, str]
    digest: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""
    created: str = ""
    tenant: str = ""

    @property
    def key(self) -> str:
        """Its registered name."""
        return join_key(self.tenant, self.name)

    def body(self) -> dict[str, Any]:
        """JSON form without the name, version and tenant."""
        return {
            "recipe": self.recipe,
            "parents": dict(self.parents),
            "digest": self.digest,
            "defaults": dict(self.defaults),
            "description": self.description,
            "created": self.created,
        }


class DamageError(ValueError):
    """A row of the registry that cannot be read; the message says why."""


def now() -> str:
    """The time in UTC, ISO 8601, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class _AdapterInfo(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, FiniteFloat | str | None] = Field(init=False)

    rank: int = Field(ge=1)
    modules: int
    bytes: int
    dtype: str
    fusion_digest: HexDigest
    effect: FiniteFloat
    norm: FiniteFloat = 0.0
    built: str = ""
    gate: str = ""
    answer_only: bool = False
    weight_low: FiniteFloat | None = None
    weight_high: FiniteFloat | None = None


class _Defaults(BaseModel):
    """Types alone: the ranges were checked when the version was made, and may be others now."""

    model_config = ConfigDict(strict=True, extra="forbid")

    system: str = ""
    chat_template: str = ""
    temperature: FiniteFloat = 0
    top_p: FiniteFloat = 0
    max_tokens: int = 0
    stop: str | list[str] = ""


class _VersionBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    recipe: str
    parents: dict[str, HexDigest]
    digest: HexDigest
    defaults: _Defaults
    description: str
    created: str


class _AdapterRow(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    digest: HexDigest
    created: str


def add_checksum(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table, by column, with the SHA-256 of its columns: of one that no earlier version ever updates."""
    return {**row, "checksum": sha256(json.dumps(dict(row), sort_keys=True).encode()).hexdigest()}


def read_adapter(name: object, digest: object, info: object, created: object, checksum: object = None) -> AdapterRecord:
    """The record in a row of their tables; DamageError when it holds something else, or not what was written."""
    try:
        row = _AdapterRow.model_validate({"name": name, "digest": digest, "created": created})
        details = _AdapterInfo.model_validate_json(_check_text(info)).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise _damage(error) from error
    tenant, plain = split_key(row.name)
    _check_row(tenant, plain, row.created)
    record = AdapterRecord(plain, row.digest, details, row.created, tenant)
    if record.gate:
        try:
            Readout.from_text(record.gate)
        except (ValueError, AdapterError) as error:
            raise DamageError(f"its gate cannot be read: {error}") from error
    _check_unchanged({"name": name, "digest": digest, "info": info, "created": created}, checksum)
    return record


def read_version(name: object, version: object, body: object, checksum: object = None) -> ProfileVersion:
    """The version in a row of their table; DamageError when it holds something else, or not what was written."""
    try:
        content = _VersionBody.model_validate_json(_check_text(body)).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise _damage(error) from error
    if type(version) is not int or version < 1:
        raise DamageError(f"its version is {version!r:.100}, expected 1 or more")
    tenant, plain = split_key(str(name))
    profile = ProfileVersion(plain, version, **content, tenant=tenant)
    _check_row(tenant, plain, profile.created)
    try:
        missing = set(parse(profile.recipe, max_weight=float("inf")).parents) - profile.parents.keys()
    except RecipeError as error:
        raise DamageError(f"its recipe cannot be read: {error}") from error
    if missing:
        raise DamageError(f"it has no digest of {min(missing)!r}")
    _check_unchanged({"name": name, "version": version, "body": body}, checksum)
    return profile


def _check_unchanged(row: Mapping[str, object], checksum: object) -> None:
    """Bytes that change on a disk may leave a row that can be read; one without a checksum is taken as it is."""
    if checksum is not None and add_checksum(row)["checksum"] != checksum:
        raise DamageError("it is not as it was written: its checksum does not fit what it holds")


def _check_text(value: object) -> str:
    if not isinstance(value, str):
        raise DamageError(f"it holds {type(value).__name__}, expected JSON text")
    return value


def _check_row(tenant: str, name: str, created: str) -> None:
    try:
        check_tenant(tenant)
        check_name(name)
        datetime.fromisoformat(created).timestamp()
    except (ValueError, OverflowError) as error:
        raise DamageError(str(error)) from error


def _damage(error: ValidationError) -> DamageError:
    faults = error.errors()
    if not faults[0]["loc"]:
        return DamageError("it is not a JSON object")
    return DamageError(describe_fault(faults)[0].rstrip("."))
