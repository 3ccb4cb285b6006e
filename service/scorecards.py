"""Measured results, attached to the digests of fusions: bounded in number and bytes, read page by page, removable."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select

from service.audit import Entry, digest_text
from service.errors import ApiError
from service.evidence import Evidence
from service.records import now
from service.registry import Registry, to_json
from service.settings import Settings
from service.snapshot import ROW_BYTES
from service.tables import SCORECARDS
from service.tenants import join_key
from service.waits import enter

MAX_SCORECARD_BYTES = 64 * 1024
MAX_SCORECARDS = 1000
"""Of one fusion and tenant."""
MAX_PAGE_BYTES = 2**20
"""A page of scorecards ends with the one that reaches this."""


@dataclass(frozen=True, slots=True)
class AttachedCard:
    """A scorecard as it was attached to the fusion `digest`, when, and with which key."""

    number: int
    digest: str
    body: dict[str, Any]
    created: str
    key: str


@dataclass(frozen=True, slots=True)
class Scorecards:
    """The scorecards of one registry. A tenant reads its own and the public ones, of tenant "", and changes its own."""

    settings: Settings
    registry: Registry
    write_lock: asyncio.Lock
    """Held by everything that changes the registry, for the change alone."""
    evidence: Evidence | None = None
    """What a policy reads of them."""

    async def add(self, digest: str, card: Mapping[str, Any], *, tenant: str = "", key: str = "") -> int:
        """Attach a measured result to a fusion; returns its id. 413 and 409 when there is no room for it. `key` is the
        public id of the API key that sent it.
        """
        body = to_json(card)
        if len(body) > MAX_SCORECARD_BYTES:
            raise ApiError(413, f"A scorecard may have at most {MAX_SCORECARD_BYTES} bytes.")

        def write(connection: Connection) -> int:
            row = insert(SCORECARDS).values(digest=digest, body=body, created=now(), tenant=tenant, key=key)
            return int(connection.execute(row).inserted_primary_key[0])  # type: ignore[index]  # one row has one

        async with self._write():
            if self.registry.snapshot.scorecard_counts[join_key(tenant, digest)] >= MAX_SCORECARDS:
                message = f"This fusion already has {MAX_SCORECARDS} scorecards, the limit; delete some of them first."
                raise ApiError(409, message)
            self.registry.check_room(len(body), self.settings.registry_bytes)
            self.registry.quotas.check_scorecard(self.registry.snapshot, tenant, len(body) + ROW_BYTES)
            try:
                return await self.registry.write(
                    write,
                    lambda _: self.registry.snapshot.add_scorecards(digest, len(body), tenant=tenant),
                    lambda number: Entry(
                        "scorecard.add", join_key(tenant, digest), after={"id": number, **digest_text(body)}
                    ),
                )
            finally:
                self._forget(digest)

    async def find_newest(self, digest: str, tenant: str) -> str | None:
        """When the newest scorecard was made of those of a fusion that the tenant sees; None when there is none."""
        counts = self.registry.snapshot.scorecard_counts
        owners = {owner for owner in ("", tenant) if counts.get(join_key(owner, digest))}
        table = SCORECARDS.c
        query = select(func.max(table.created)).where(table.digest == digest, table.tenant.in_(owners))
        return await self.registry.transact(lambda connection: connection.scalar(query)) if owners else None

    def _forget(self, digest: str) -> None:
        if self.evidence is not None:
            self.evidence.forget(digest)

    async def read(self, digest: str, *, limit: int, after: int, tenant: str = "") -> tuple[list[dict[str, Any]], bool]:
        """Up to `limit` results of a fusion with an id over `after`, oldest first, and whether there are more."""
        table = SCORECARDS.c
        query = select(table.id, table.body, table.created, table.key).where(table.digest == digest, table.id > after)
        query = query.where(table.tenant.in_({"", tenant})).order_by(table.id).limit(limit + 1)

        def read(connection: Connection) -> tuple[list[dict[str, Any]], bool]:
            cards: list[dict[str, Any]] = []
            size = 0
            for number, body, created, key in connection.execute(query.execution_options(yield_per=10)):
                if len(cards) == limit or size >= MAX_PAGE_BYTES:
                    return cards, True
                cards.append(_read_card(body) | {"scorecard_id": number, "created": str(created), "key": str(key)})
                size += len(str(body))
            return cards, False

        return await self.registry.transact(read)

    async def read_newest(self, *, limit: int, before: int, tenant: str = "") -> tuple[list[AttachedCard], bool]:
        """Up to `limit` results of all fusions with an id below `before` (0: any), newest first, and whether there are
        more.
        """
        table = SCORECARDS.c
        query = select(table.id, table.digest, table.body, table.created, table.key)
        query = query.where(table.tenant.in_({"", tenant})).order_by(table.id.desc()).limit(limit + 1)
        if before:
            query = query.where(table.id < before)

        def read(connection: Connection) -> tuple[list[AttachedCard], bool]:
            cards: list[AttachedCard] = []
            size = 0
            for number, digest, body, created, key in connection.execute(query.execution_options(yield_per=10)):
                if len(cards) == limit or size >= MAX_PAGE_BYTES:
                    return cards, True
                cards.append(AttachedCard(number, str(digest), _read_card(body), str(created), str(key)))
                size += len(str(body))
            return cards, False

        return await self.registry.transact(read)

    async def remove(self, digest: str, number: int | None = None, *, tenant: str = "") -> None:
        """Delete one result of a fusion by its id, or all of them; 404 when the tenant has none of its own."""
        matches = (SCORECARDS.c.digest == digest) & (SCORECARDS.c.tenant == tenant)
        if number is not None:
            matches &= SCORECARDS.c.id == number

        def write(connection: Connection) -> tuple[int, int]:
            size = func.coalesce(func.sum(func.length(SCORECARDS.c.body)), 0)
            nbytes, count = connection.execute(select(size, func.count()).where(matches)).one()
            connection.execute(delete(SCORECARDS).where(matches))
            return int(nbytes), int(count)

        def apply(removed: tuple[int, int]) -> None:
            if removed[1]:
                self.registry.snapshot.remove_scorecards(digest, *removed, tenant=tenant)

        def tell(removed: tuple[int, int]) -> Entry | None:
            before = {"id": number, "bytes": removed[0], "count": removed[1]}
            return Entry("scorecard.remove", join_key(tenant, digest), before) if removed[1] else None

        async with self._write():
            try:
                count = (await self.registry.write(write, apply, tell))[1]
            finally:
                self._forget(digest)
        if not count:
            what = "no scorecards" if number is None else f"no scorecard {number}"
            own = " of yours" if tenant else ""
            raise ApiError(404, f"This fusion has {what}{own}; GET /v1/scorecards/{digest} lists them.", param="digest")

    @asynccontextmanager
    async def _write(self) -> AsyncIterator[None]:
        """Alone, and with the registry knowing what its database holds."""
        wait_s = self.settings.wait_timeout_s
        async with enter(self.write_lock, wait_s, "other changes of the registry"), self.registry.change():
            yield


def _read_card(body: object) -> dict[str, Any]:
    """The JSON object in a row, or what is wrong with it."""
    try:
        card = json.loads(str(body))
        json.dumps(card, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        return {"state": "damaged", "reason": f"it is not valid JSON: {error}; delete it"}
    return card if isinstance(card, dict) else {"state": "damaged", "reason": "it is not a JSON object; delete it"}
