"""API keys: made, rotated and revoked; a secret is shown once, when it is made."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, delete, insert, select, update

from service.audit import Entry, describe_key
from service.callers import Role
from service.errors import ApiError
from service.key_records import ApiKey, hash_secret, make_id, make_secret, write_time
from service.key_ring import KeyRing, read_now
from service.registry import Registry
from service.settings import Settings
from service.tables import KEYS
from service.validation import MAX_QUOTED
from service.waits import enter, finish

MAX_KEYS = 10_000
"""Keys of a registry; the oldest of those that are not taken any more make room."""
MAX_GRACE = timedelta(days=90)


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one registry."""

    settings: Settings
    registry: Registry
    write_lock: asyncio.Lock
    """Held by everything that changes the registry, for the change alone."""
    ring: KeyRing

    def find(self, id_: str) -> ApiKey:
        """The key with this id; 404 when there is none."""
        key = self.registry.snapshot.keys.get(id_)
        if key is None:
            message = f"No key has the id {id_[:MAX_QUOTED]!r}; GET /v1/keys lists all keys."
            raise ApiError(404, message, param="id")
        return key

    async def read_uses(self) -> dict[str, str]:
        """When each key was last used, by id; of keys that never were, nothing."""

        def read(connection: Connection) -> dict[str, str]:
            query = select(KEYS.c.id, KEYS.c.used).where(KEYS.c.used.is_not(None))
            return {str(id_): str(used) for id_, used in connection.execute(query)}

        known = await self.registry.transact(read)
        here = {id_: used for id_ in self.registry.snapshot.keys if (used := self.ring.last_use(id_)) is not None}
        return known | {id_: max(used, known.get(id_, "")) for id_, used in here.items()}

    async def create(
        self, role: Role, *, tenant: str = "", label: str = "", expires: str | None = None
    ) -> tuple[ApiKey, str]:
        """A new key and its secret. 409 unless it, or one before it, is an admin's: nobody could make another one."""
        if role == "admin" and tenant:
            message = "An admin has the things of all tenants: leave 'tenant' out, or make a deployer's key."
            raise ApiError(400, message, param="tenant")
        if expires is not None and expires <= read_now():
            raise ApiError(400, f"The key would end at {expires}, which is over.", param="expires")

        async def make() -> tuple[ApiKey, str]:
            async with self._write():
                if role != "admin" and not self.ring.has_admin:
                    message = "The first key must be an admin's: from then on nothing is answered without a key."
                    raise ApiError(409, message, param="role")
                gone = self._find_room()
                secret, info = make_secret(), {"label": label}
                key = ApiKey(make_id(), hash_secret(secret), role, tenant, read_now(), expires, info=info)
                await self._insert(key, gone)
                return key, secret

        return await finish(make())

    async def rotate(self, id_: str, grace: timedelta) -> tuple[ApiKey, str]:
        """The key with a new secret; the one it had is taken for `grace` more, and one from before that no more."""
        if grace > MAX_GRACE:
            raise ApiError(400, f"The old secret may be taken for at most {MAX_GRACE.days} days.", param="grace")

        async def change() -> tuple[ApiKey, str]:
            async with self._write():
                before = self.find(id_)
                if (state := before.find_state(read_now())) != "active":
                    raise ApiError(409, f"The key {id_} is {state}; make a new one.", param="id")
                secret = make_secret()
                old = (before.hash, write_time(datetime.now(UTC) + grace)) if grace else (None, None)
                key = replace(before, hash=hash_secret(secret), old_hash=old[0], old_until=old[1])
                await self._update(key, "key.rotate", before)
                return key, secret

        return await finish(change())

    async def revoke(self, id_: str) -> None:
        """End a key at once; one that has ended stays as it is."""

        async def change() -> None:
            async with self._write():
                before = self.find(id_)
                if before.revoked is None:
                    await self._update(replace(before, revoked=read_now()), "key.revoke", before)

        await finish(change())

    def _find_room(self) -> list[str]:
        """The ids of keys that go for a new one; 409 when all are still taken."""
        keys, at = self.registry.snapshot.keys.values(), read_now()
        if len(keys) < MAX_KEYS:
            return []
        ended = [key for key in keys if key.find_state(at) != "active"]
        if not ended:
            raise ApiError(409, f"There are {MAX_KEYS} keys, the limit; revoke some first.")
        return [min(ended, key=lambda key: key.created).id]

    async def _insert(self, key: ApiKey, gone: list[str]) -> None:
        def write(connection: Connection) -> None:
            connection.execute(delete(KEYS).where(KEYS.c.id.in_(gone)))
            connection.execute(insert(KEYS).values(key.make_row()))

        def apply(_: None) -> None:
            for id_ in gone:
                del self.registry.snapshot.keys[id_]
            self.registry.snapshot.keys[key.id] = key

        await self.registry.write(write, apply, _tell("key.create", key, None))

    async def _update(self, key: ApiKey, action: str, before: ApiKey) -> None:
        def write(connection: Connection) -> None:
            connection.execute(update(KEYS).where(KEYS.c.id == key.id).values(key.make_row()))

        def apply(_: None) -> None:
            self.registry.snapshot.keys[key.id] = key

        await self.registry.write(write, apply, _tell(action, key, before))

    @asynccontextmanager
    async def _write(self) -> AsyncIterator[None]:
        """Alone, and with the registry knowing what its database holds."""
        wait_s = self.settings.wait_timeout_s
        async with enter(self.write_lock, wait_s, "other changes of the registry"), self.registry.change():
            yield


def _tell(action: str, key: ApiKey, before: ApiKey | None) -> Callable[[None], Entry]:
    entry = Entry(action, key.id, describe_key(before), describe_key(key))
    return lambda _: entry


def write_token(key: ApiKey, secret: str) -> str:
    """What clients send: `lf-`, the id, the secret."""
    return f"lf-{key.id}-{secret}"
