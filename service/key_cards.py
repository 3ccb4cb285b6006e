"""The JSON forms of API keys, and what is asked of them, the same over HTTP and offline."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from service.callers import Role
from service.errors import ApiError
from service.key_records import TENANT, ApiKey, State, parse_moment, parse_span
from service.key_ring import read_now
from service.keys import Keys, write_token
from service.validation import StrictModel

KeyId = Annotated[str, Field(pattern="^[0-9a-f]{12}$", description="public id of a key", examples=["0f3a5c7e9b1d"])]
Moment = Annotated[str | None, Field(description="UTC, ISO 8601; null: never")]


class KeyBody(StrictModel):
    """A key to be made."""

    role: Role
    tenant: str = Field(
        default="", pattern=TENANT, description="whose things it has; empty: the operator's, all public"
    )
    label: str = Field(default="", max_length=128, description="what people call it")
    expires: str | None = Field(
        default=None,
        max_length=40,
        examples=["90d", "2027-01-31T12:00:00Z"],
        description="a time, or a span from now; null: never",
    )


class RotateBody(StrictModel):
    """How a key changes its secret."""

    grace: str = Field(
        default="24h", max_length=12, examples=["24h", "0s"], description="for how long the old secret is taken, too"
    )


class Key(BaseModel):
    """An API key, without its secret."""

    id: KeyId
    object: Literal["key"]
    role: Role
    tenant: str
    label: str
    state: State
    created: str
    expires: Moment
    revoked: Moment
    old_until: Moment = Field(description="until when the secret before the last rotation is taken; null: it is not")
    used: Moment = Field(description="when it was last used, to the minute; null: never")


class NewKey(Key):
    """A key with its secret, which is shown this once."""

    key: str = Field(description="what clients send: `lf-`, the id and the secret")


def key_card(key: ApiKey, used: str | None = None) -> Key:
    """The JSON form of a key; `used` is when it was last used."""
    at = read_now()
    in_grace = key.old_until is not None and at < key.old_until
    return Key(
        id=key.id,
        object="key",
        role=key.role,
        tenant=key.tenant,
        label=key.label,
        state=key.find_state(at),
        created=key.created,
        expires=key.expires,
        revoked=key.revoked,
        old_until=key.old_until if in_grace else None,
        used=used,
    )


def _show_once(key: ApiKey, secret: str) -> NewKey:
    return NewKey(**key_card(key).model_dump(), key=write_token(key, secret))


async def list_all(keys: Keys) -> list[Key]:
    """All keys by id."""
    known, uses = keys.registry.snapshot.keys, await keys.read_uses()
    return [key_card(key, uses.get(id_)) for id_, key in sorted(known.items())]


async def make(keys: Keys, body: KeyBody) -> NewKey:
    """A new key."""
    try:
        expires = None if body.expires is None else parse_moment(body.expires)
    except ValueError as error:
        raise ApiError(400, f"'expires': {error}.", param="expires") from error
    return _show_once(*await keys.create(body.role, tenant=body.tenant, label=body.label, expires=expires))


async def rotate(keys: Keys, key_id: str, body: RotateBody) -> NewKey:
    """A key with a new secret."""
    try:
        grace = parse_span(body.grace)
    except ValueError as error:
        raise ApiError(400, f"'grace': {error}.", param="grace") from error
    return _show_once(*await keys.rotate(key_id, grace))
