"""Which replica makes a stack or build, while the others wait for it: leases in the registry's database, which expire.

A lease saves work, and nothing rests on it: what two replicas make of one key is the same, and appears whole.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from sqlalchemy import Connection, and_, delete, func, or_, text, update
from sqlalchemy.dialects.postgresql import insert

from service.errors import ApiError
from service.registry import Registry
from service.tables import LEASES
from service.waits import finish

LEASE_S = 6.0
"""How long a replica that was killed keeps others from making what it was making."""
RENEW_S = 2.0
LOOK_S = 0.2
"""How often those who wait look whether it is made."""
_UNTIL = func.now() + text(f"interval '{LEASE_S:g} seconds'")
_KEPT = text("interval '1 hour'")
log = logging.getLogger("fusion")


class Leases:
    """The leases of one replica. All methods run on the event loop."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._holder = secrets.token_hex(16)

    @asynccontextmanager
    async def hold(self, key: str, look: Callable[[], Awaitable[Path | None]]) -> AsyncIterator[Path | None]:
        """Hold the lease of `key` for the block and yield None; or what `look` finds meanwhile, without a lease.

        Without a database nobody waits.
        """
        while not await self._take(key):
            if (path := await look()) is not None:
                yield path
                return
            await asyncio.sleep(LOOK_S)
        renewal = asyncio.create_task(self._renew(key))
        try:
            yield await look()  # the last holder has made it, perhaps
        finally:
            renewal.cancel()
            await finish(self._give_back(key))

    async def _take(self, key: str) -> bool:
        def take(connection: Connection) -> bool:
            row = insert(LEASES).values(key=key, holder=self._holder, until=_UNTIL)
            new = {"holder": self._holder, "until": _UNTIL}
            row = row.on_conflict_do_update(index_elements=[LEASES.c.key], set_=new, where=LEASES.c.until < func.now())
            return connection.execute(row.returning(LEASES.c.key)).first() is not None

        try:
            return await self._registry.transact(take)
        except ApiError as error:
            log.warning("%s is made without a lease: %s", key[:12], error.message)
            return True

    async def _renew(self, key: str) -> None:
        row = update(LEASES).where(LEASES.c.key == key, LEASES.c.holder == self._holder).values(until=_UNTIL)
        while True:
            await asyncio.sleep(RENEW_S)
            with suppress(ApiError):  # it expires, and another replica does the same work
                await self._registry.transact(lambda connection: connection.execute(row).rowcount)

    async def _give_back(self, key: str) -> None:
        own = and_(LEASES.c.key == key, LEASES.c.holder == self._holder)
        old = LEASES.c.until < func.now() - _KEPT  # of replicas that were killed
        with suppress(ApiError):
            await self._registry.transact(
                lambda connection: connection.execute(delete(LEASES).where(or_(own, old))).rowcount
            )
