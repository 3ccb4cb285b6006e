"""What the engine's places hold at one moment: stacks and builds, those on their way there, and who uses them."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from service.attempts import Stage
from service.placement import Kind

if TYPE_CHECKING:
    from service.evictions import Resident
    from service.residency import Residency

Digests = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Occupant:
    """A stack or build in a place of the engine, or on its way to one."""

    key: str
    kind: Kind
    state: Literal["warm", "draining"] | Stage
    """`draining`: no new request gets it."""
    digests: Digests
    """Of its adapters; empty when they are not known any more."""
    requests: int
    """That use it, or wait for it."""
    seconds: float
    """Since it was last used; of one on its way, since it was first asked for."""
    rank: int = 0
    error: float = 0.0
    """Relative Frobenius error of a build."""
    pinned: bool = False
    """Whether it stays while there is other room."""
    in_batch: bool = False
    """Whether it is among those that fit into one batch: the ones in use first, then those used last."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """All occupants; `slots` stacks and builds fit into one batch, `free` further ones into the engine."""

    slots: int
    free: int
    occupants: tuple[Occupant, ...]


def survey(residency: "Residency", made: Mapping[str, Digests], slots: int) -> Occupancy:
    """The occupants of the engine, those in use first; `made` has the adapters of builds, by key."""
    pinned = residency.list_pinned()
    idle = sum(not one.leases and key not in pinned for key, one in residency.residents.items())
    free = residency.count_room() - idle
    return Occupancy(slots, free, tuple(_list_occupants(residency, made, slots)))


def _list_occupants(residency: "Residency", made: Mapping[str, Digests], slots: int) -> Iterator[Occupant]:
    now, pinned = time.monotonic(), residency.list_pinned()

    def describe(resident: "Resident", state: Literal["warm", "draining"], *, in_batch: bool = False) -> Occupant:
        digests = tuple(resident.widths) or made.get(resident.key, ())
        since = now - resident.last_used
        kind, rank, error = resident.kind, resident.rank, resident.error
        stays = resident.key in pinned
        return Occupant(resident.key, kind, state, digests, resident.leases, since, rank, error, stays, in_batch)

    ordered = sorted(residency.residents.values(), key=lambda one: (one.leases > 0, one.last_used), reverse=True)
    for number, resident in enumerate(ordered):
        yield describe(resident, "warm", in_batch=number < slots)
    for resident in residency.draining:
        yield describe(resident, "draining")
    for attempt in residency.attempts:
        making, waiting = attempt.making, len(attempt.waiters)
        yield Occupant(making.key, making.kind, attempt.stage, made.get(making.key, ()), waiting, now - attempt.began)
