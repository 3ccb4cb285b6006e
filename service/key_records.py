"""API keys as the registry keeps them: of a secret its hash alone.

A secret has 256 random bits, so that SHA-256 does without salt and stretching: there is nothing to guess.
"""

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.callers import Caller, Role
from service.records import DamageError, HexDigest
from service.tenants import TENANT_PATTERN
from service.validation import describe_fault

State = Literal["active", "expired", "revoked"]
TENANT = f"^({TENANT_PATTERN})?$"
"""A tenant's name; empty for the operator's."""
_ID = "^[0-9a-f]{12}$"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_TIME = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")]
"""As all times of keys are written, so that they can be compared as text."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key; its times are ISO 8601 in UTC, in seconds."""

    id: str
    hash: str
    role: Role
    tenant: str
    created: str
    expires: str | None = None
    revoked: str | None = None
    old_hash: str | None = None
    """Of the secret before a rotation, which is taken until `old_until`."""
    old_until: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def caller(self) -> Caller:
        """Who sends it."""
        return Caller(self.id, self.role, self.tenant)

    @property
    def label(self) -> str:
        """What people call it."""
        return str(self.info.get("label", ""))

    def find_state(self, at: str) -> State:
        """Whether it is taken at the time `at`."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and at >= self.expires else "active"

    def list_hashes(self, at: str) -> tuple[str, ...]:
        """Hashes of the secrets that are taken at the time `at`."""
        if self.find_state(at) != "active":
            return ()
        in_grace = self.old_hash is not None and self.old_until is not None and at < self.old_until
        return (self.hash, self.old_hash) if in_grace and self.old_hash else (self.hash,)

    def make_row(self) -> dict[str, Any]:
        """Its row in the table of keys."""
        names = ("id", "hash", "role", "tenant", "created", "expires", "revoked", "old_hash", "old_until")
        return {name: getattr(self, name) for name in names} | {"info": json.dumps(dict(self.info), allow_nan=False)}


class _Row(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    id: str = Field(pattern=_ID)
    hash: HexDigest
    role: Role
    tenant: str = Field(pattern=TENANT)
    created: _TIME
    expires: _TIME | None
    revoked: _TIME | None
    old_hash: HexDigest | None
    old_until: _TIME | None
    info: dict[str, Any]


def read_key(row: Mapping[str, Any]) -> ApiKey:
    """The key in a row of their table; DamageError when it holds something else."""
    try:
        info = json.loads(str(row["info"]))
        return ApiKey(**_Row.model_validate({**row, "info": info}).model_dump())
    except ValidationError as error:
        raise DamageError(describe_fault(error.errors())[0].rstrip(".")) from error
    except (ValueError, RecursionError) as error:
        raise DamageError(str(error)) from error


def make_id() -> str:
    """The public id of a new key."""
    return secrets.token_hex(6)


def is_id(text: str) -> bool:
    """Whether `text` has the form of what `make_id` makes; vLLM's own keys are called otherwise."""
    return re.search(_ID, text) is not None


def make_secret() -> str:
    """A new secret: 256 random bits as 43 characters."""
    return secrets.token_urlsafe(32)


def hash_secret(secret: str) -> str:
    """What is kept of a secret: SHA-256, hexadecimal."""
    return sha256(secret.encode()).hexdigest()


def write_time(moment: datetime) -> str:
    """A time as keys have it."""
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def parse_span(text: str) -> timedelta:
    """The time that `90d`, `12h`, `30m` or `45s` is; ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if match is None:
        raise ValueError(f"{text[:40]!r} is not a time span; expected a number followed by d, h, m or s, as in '90d'")
    return timedelta(seconds=int(match[1]) * _UNITS[match[2]])


def parse_moment(text: str) -> str:
    """The time that an ISO 8601 time with its zone is, or a span from now; ValueError for anything else."""
    try:
        if re.fullmatch(r"\d+[a-z]", text):
            return write_time(datetime.now(UTC) + parse_span(text))
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError(f"{text[:40]!r} has no time zone; add one, as in '2027-01-31T12:00:00Z'")
        return write_time(moment)
    except OverflowError as error:
        raise ValueError(f"{text[:40]!r} is too far away") from error
