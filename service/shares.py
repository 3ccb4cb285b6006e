"""Limits that replicas share: each takes its uses from a share of every limit, which it leases in the database.

All shares of a limit together never exceed it. A replica asks for more before what it has is used, so that requests
wait for the database only when they are the first of their key for a while. A replica that dies, or loses the database,
uses nothing more once its lease has ended; its share stays taken for a minute longer, as long as what it used counts.
"""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import Connection, delete, func, select, text
from sqlalchemy.dialects.postgresql import insert

from service.errors import ApiError
from service.ledger import WINDOW_S, Key, Ledger
from service.tables import LIMIT_SHARES

if TYPE_CHECKING:
    from service.follower import Follower

LEASE_S = 10.0
"""How long a replica uses a share without having renewed it."""
RENEW_S = 2.0
ASK_AGAIN_S = 0.2
"""How long nothing more is asked of a limit of which others had the rest: whoever is over it costs no transactions."""
SPARE = 8
"""What a replica has of a limit and does not use shrinks to this part of it, for the others."""
log = logging.getLogger("fusion")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a replica wants of one limit: at least `amount`, and half of what is free beside it when it `grows`."""

    limit: float
    amount: int
    grows: bool


Rows = Iterable[tuple[Key, str, int]]
"""Key, holder and amount of every share whose lease has not ended."""


def plan_shares(ledger: Ledger, wanted: Mapping[Key, tuple[float, int]]) -> dict[Key, Plan]:
    """What to ask the database for, given what requests have `wanted` (limit and amount); what is not used is given up
    at once, in the ledger, before the others are told.
    """
    plans = {}
    for key in {*ledger.meters, *wanted}:
        meter = ledger.find(key)
        limit, need = wanted.get(key, (meter.limit, 0))
        meter.limit = limit
        share, spare = int(meter.share), int(meter.share) - meter.used
        if need or (meter.used and spare < limit / SPARE / 2):
            plans[key] = Plan(limit, max(share, meter.used + need), grows=True)
        elif share:
            if spare > limit / SPARE or not meter.used:
                meter.share = meter.used + max(0, spare) // 2
            plans[key] = Plan(limit, int(meter.share), grows=False)
    return plans


def divide(rows: Rows, holder: str, plans: Mapping[Key, Plan]) -> dict[Key, int]:
    """What of each plan `holder` gets beside the shares that the others have."""
    others = dict.fromkeys(plans, 0)
    for key, owner, amount in rows:
        if owner != holder and key in others:
            others[key] += amount
    granted = {}
    for key, plan in plans.items():
        free = max(0, int(plan.limit) - others[key])
        more = max(0, free - plan.amount) // 2 if plan.grows else 0
        granted[key] = min(free, plan.amount + more)
    return granted


def apply_shares(ledger: Ledger, granted: Mapping[Key, int], until: float) -> None:
    """Use what was granted until then (seconds of the ledger's clock)."""
    for key, amount in granted.items():
        meter = ledger.find(key)
        meter.share, meter.until = amount, until


class Shares:
    """The shares of one replica. All methods run on the event loop."""

    def __init__(self, registry: "Follower", ledger: Ledger, *, now: Callable[[], float] = time.monotonic) -> None:
        """`now` is the clock of the ledger."""
        self._registry, self._ledger, self._now = registry, ledger, now
        self._holder = secrets.token_hex(16)
        self._lock = asyncio.Lock()
        self._spent: dict[Key, float] = {}
        """Limits of which others had the rest, and until when that is taken for granted (seconds)."""

    async def ask(self, wanted: Mapping[Key, tuple[float, int]]) -> None:
        """Get larger shares, as far as there are any; `ApiError` 503 when the database does not answer."""
        async with self._lock:
            now = self._now()
            self._spent = {key: until for key, until in self._spent.items() if until > now}
            short = self._find_short(wanted)
            if short and not short.keys() & self._spent.keys():
                await self._renew(short)
                self._spent |= dict.fromkeys(self._find_short(short), self._now() + ASK_AGAIN_S)

    def _find_short(self, wanted: Mapping[Key, tuple[float, int]]) -> dict[Key, tuple[float, int]]:
        return {key: want for key, want in wanted.items() if self._ledger.find_room(key) < want[1]}

    async def run(self) -> None:
        """Renew the leases until cancelled, and ask for more of what is used."""
        while True:
            await asyncio.sleep(RENEW_S)
            async with self._lock:
                with suppress(ApiError):  # they end, and requests are told
                    await self._renew({})

    async def _renew(self, wanted: Mapping[Key, tuple[float, int]]) -> None:
        until = self._now() + LEASE_S
        self._ledger.forget_idle()
        if plans := plan_shares(self._ledger, wanted):
            apply_shares(self._ledger, await self._registry.transact(lambda c: self._write(c, plans)), until)

    def _write(self, connection: Connection, plans: Mapping[Key, Plan]) -> dict[Key, int]:
        table = LIMIT_SHARES
        connection.execute(text(f"LOCK TABLE {table.name} IN EXCLUSIVE MODE"))  # one replica at a time
        connection.execute(delete(table).where(table.c.until <= func.clock_timestamp()))
        found = connection.execute(select(table.c.subject, table.c.kind, table.c.holder, table.c.amount))
        granted = divide((((row.subject, row.kind), row.holder, row.amount) for row in found), self._holder, plans)
        rows = [{"subject": s, "kind": k, "holder": self._holder, "amount": n} for (s, k), n in granted.items()]
        kept = math.ceil(LEASE_S) + WINDOW_S + 1
        row = insert(table).values(until=func.clock_timestamp() + text(f"interval '{kept} seconds'"))
        new = {"amount": row.excluded.amount, "until": row.excluded.until}
        connection.execute(row.on_conflict_do_update(index_elements=list(table.primary_key), set_=new), rows)
        return granted
