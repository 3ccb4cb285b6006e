"""What the engine holds, and what was taken out of it: when, why, and for what."""

import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from service.placement import Home, Kind
from service.records import now

Reason = Literal["room", "disk", "gone"]
"""Its place was needed, or that of its files on a full disk, or nothing needs it any more."""
MAX_EVICTIONS = 1000


class Loader(Protocol):
    """The part of the engine that residency needs."""

    async def load(self, path: Path, name: str) -> object:
        """Load the adapter folder `path` into every worker; returns vLLM's handle."""

    async def unload(self, request: object) -> None:
        """Free what `load` returned."""


@dataclass(slots=True, eq=False)
class Resident:
    """A stack or a build that the engine holds."""

    key: str
    kind: Kind
    path: Path
    request: object
    rank: int
    error: float = 0.0
    widths: Mapping[str, int] = field(default_factory=dict)
    """Stacks: width of each member's coordinate range, by digest, in order."""
    leases: int = 0
    last_used: float = field(default_factory=time.monotonic)
    loaded: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Eviction:
    """When (ISO 8601, UTC) and why a stack or build was evicted; `wanted_by` is the key of what needed its place."""

    at: str
    reason: Reason
    wanted_by: str | None
    members: frozenset[str]


class Evictions:
    """The last eviction of each stack and build, the newest `MAX_EVICTIONS`."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, Eviction] = OrderedDict()

    def record(self, resident: Resident, reason: Reason, wanted_by: str | None) -> None:
        """Remember an eviction."""
        self._found[resident.key] = Eviction(now(), reason, wanted_by, frozenset(resident.widths))
        self._found.move_to_end(resident.key)
        if len(self._found) > MAX_EVICTIONS:
            self._found.popitem(last=False)

    def find(self, home: Home) -> Eviction | None:
        """The newest of what could have served the fusions with this home."""
        for key, eviction in reversed(self._found.items()):
            if key == home.key or (home.members and home.members <= eviction.members):
                return eviction
        return None
