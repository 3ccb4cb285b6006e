"""The audit: who changed what, written in the transaction of the change, each entry chained to the one before by hash.

An entry is a JSON object; its hash is the SHA-256 of its canonical text, which holds the hash of the entry before. So
an entry that was changed, removed or moved breaks the chain; of a tail that was cut off, only a hash that somebody has
kept tells. Secrets, prompts and templates are in no entry: of texts there is a digest and a length.
"""

import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, NamedTuple

from sqlalchemy import Connection, delete, insert, select

from service.key_records import ApiKey
from service.records import AdapterRecord, ProfileVersion, now
from service.tables import AUDIT

MAX_ENTRIES = 100_000
"""Entries that the registry keeps, the newest."""
NO_HASH = "0" * 64
"""What the first entry has as the hash of the one before."""
MAX_RECIPE = 4096
"""Characters of a recipe that an entry has as text; of a longer one a digest, so that no line of the file is long."""
_ADAPTER_INFO = ("rank", "modules", "bytes", "dtype", "base_mismatch", "built", "answer_only")


@dataclass(frozen=True, slots=True)
class Actor:
    """Who makes a change: key, role and tenant, address, and the request's id. The defaults are the server's own."""

    key: str = ""
    role: str = "server"
    tenant: str = ""
    address: str = ""
    request: str = ""


current_actor: ContextVar[Actor] = ContextVar("current_actor", default=Actor())  # noqa: B039 - it is frozen


@dataclass(frozen=True, slots=True)
class Entry:
    """What a change is: as `adapter.add`, the name of what it is about, and what that was before and is now."""

    action: str
    target: str
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None


class AuditRow(NamedTuple):
    """An entry as it is kept."""

    id: int
    hash: str
    body: str

    def to_dict(self) -> dict[str, Any]:
        """As `GET /v1/audit` and a line of the file have it."""
        return {"id": self.id, "hash": self.hash, "entry": json.loads(self.body)}


def write_canonical(entry: Mapping[str, Any]) -> str:
    """The text that an entry's hash is of: JSON in ASCII, keys sorted, without spaces."""
    return json.dumps(dict(entry), sort_keys=True, separators=(",", ":"), allow_nan=False)


def hash_text(text: str) -> str:
    """SHA-256 of a text, hexadecimal."""
    return sha256(text.encode(errors="surrogatepass")).hexdigest()


def append_entry(connection: Connection, entry: Entry, actor: Actor) -> None:
    """Write `entry` behind the last one, in the transaction of `connection`; one change of the tables at a time."""
    last = connection.execute(select(AUDIT.c.id, AUDIT.c.hash).order_by(AUDIT.c.id.desc()).limit(1)).first()
    number, previous = (1, NO_HASH) if last is None else (last.id + 1, last.hash)
    head = {"id": number, "previous": previous, "time": now(), "by": asdict(actor)}
    body = write_canonical(head | asdict(entry))
    connection.execute(insert(AUDIT).values(id=number, body=body, hash=hash_text(body)))
    connection.execute(delete(AUDIT).where(AUDIT.c.id <= number - MAX_ENTRIES))


def read_entries(connection: Connection, *, after: int, limit: int, newest: bool = False) -> list[AuditRow]:
    """Up to `limit` entries with an id over `after`, oldest first; `newest`: below `after` (0: any), newest first."""
    query = select(AUDIT.c.id, AUDIT.c.hash, AUDIT.c.body).limit(limit)
    if newest:
        query = query.where(AUDIT.c.id < after) if after else query
        query = query.order_by(AUDIT.c.id.desc())
    else:
        query = query.where(AUDIT.c.id > after).order_by(AUDIT.c.id)
    return [AuditRow(*row) for row in connection.execute(query)]


def digest_text(text: str) -> dict[str, Any]:
    """What an entry says of a text that it must not hold."""
    return {"sha256": hash_text(text), "length": len(text)}


def describe_adapter(record: AdapterRecord | None) -> dict[str, Any] | None:
    """What an entry says of an adapter."""
    if record is None:
        return None
    return {"digest": record.digest} | {key: record.info[key] for key in _ADAPTER_INFO if key in record.info}


def describe_version(version: ProfileVersion | None) -> dict[str, Any] | None:
    """What an entry says of a version of a profile: its texts as digests."""
    if version is None:
        return None
    recipe = version.recipe if len(version.recipe) <= MAX_RECIPE else digest_text(version.recipe)
    body = {"version": version.version, "recipe": recipe, "digest": version.digest}
    defaults = {name: _hide_texts(value) for name, value in version.defaults.items()}
    return body | {"defaults": defaults, "description": digest_text(version.description)}


def describe_key(key: ApiKey | None) -> dict[str, Any] | None:
    """What an entry says of an API key: no hash of its secret."""
    if key is None:
        return None
    names = ("role", "tenant", "label", "created", "expires", "revoked", "old_until")
    return {name: getattr(key, name) for name in names}


def _hide_texts(value: Any) -> Any:
    if isinstance(value, str):
        return digest_text(value)
    return digest_text(json.dumps(value)) if isinstance(value, Sequence) else value
