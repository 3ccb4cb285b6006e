"""What the scorecards of a fusion show, of those that a policy trusts: read once from the database, then kept."""

import json
import math
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select

from service.policy_rules import EvidenceRule
from service.registry import Registry
from service.snapshot import Snapshot
from service.tables import SCORECARDS
from service.tenants import join_key

MAX_FUSIONS = 1024
"""Fusions whose cards are kept."""


@dataclass(frozen=True, slots=True)
class Card:
    """The numbers of a scorecard that some rule is about, who attached it and when (ISO 8601, UTC)."""

    number: int
    key: str
    tenant: str
    created: str
    measures: dict[str, float]


class Evidence:
    """The cards of fusions, by digest, newest first."""

    def __init__(self, registry: Registry, rules: Collection[EvidenceRule]) -> None:
        self._registry = registry
        self._measures = {rule.measure for rule in rules}
        self._keys = sorted({key for rule in rules for key in rule.keys})
        self._known: OrderedDict[str, list[Card]] = OrderedDict()
        self._snapshot: Snapshot | None = None
        self._changes = 0
        """How often a card was added or removed here."""

    def forget(self, digest: str) -> None:
        """Read the cards of a fusion again when they are asked for: some were added or removed."""
        self._changes += 1
        self._known.pop(digest, None)

    async def find(self, digest: str, tenant: str) -> list[Card]:
        """The cards of a fusion by keys that any rule trusts and nobody has revoked; 503 when the database does not
        answer.
        """
        if self._registry.snapshot is not self._snapshot:  # a replica has changed something
            self._snapshot = self._registry.snapshot
            self._known.clear()
        counts = self._registry.snapshot.scorecard_counts
        if not any(counts.get(join_key(owner, digest)) for owner in ("", tenant)):
            return []
        if (cards := self._known.get(digest)) is None:
            before = self._changes, self._snapshot
            cards = await self._registry.transact(lambda connection: self._read(connection, digest))
            if before == (self._changes, self._registry.snapshot):
                self._known[digest] = cards
                if len(self._known) > MAX_FUSIONS:
                    self._known.popitem(last=False)
        else:
            self._known.move_to_end(digest)
        # Whoever got hold of a key may have attached cards with it before it was revoked.
        return [card for card in cards if not self._registry.snapshot.is_revoked(card.key)]

    def _read(self, connection: Connection, digest: str) -> list[Card]:
        table = SCORECARDS.c
        query = select(table.id, table.key, table.tenant, table.created, table.body).order_by(table.id.desc())
        query = query.where(table.digest == digest, table.key.in_(self._keys)).execution_options(yield_per=10)
        return list(self._parse(connection.execute(query)))

    def _parse(self, rows: Iterable[Any]) -> Iterable[Card]:
        for number, key, tenant, created, body in rows:
            if measures := read_measures(body, self._measures):
                yield Card(number, key, tenant, created, measures)


def read_measures(body: str, names: Collection[str]) -> dict[str, float]:
    """The measures of these names in a scorecard's JSON: numbers, or objects with a `value`, as sweeps publish them."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    found = {}
    for name in names if isinstance(content, dict) else ():
        value = content.get(name)
        value = value.get("value") if isinstance(value, dict) else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                found[name] = float(value)
            except OverflowError:  # no limit holds for it
                found[name] = math.nan
    return found
