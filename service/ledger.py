"""What callers have used of their limits within the last minute, and what is reserved for requests that run.

An amount is reserved before anything is computed, and settled afterwards with what was used. It counts from its
reservation until a minute after it was settled: so in no 60 seconds, wherever they begin, is more used than the limit,
however many requests run at once. The error is on the other side alone: what was used counts for up to a second longer
than that minute, and while a request runs, all that it may use counts as used.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Kind = Literal["requests", "tokens", "concurrent", "builds"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What is limited: three amounts a minute, and requests in progress."""
WINDOW_S = 60
MAX_METERS = 4096
"""Meters in memory, when the empty ones go."""
Key = tuple[str, Kind]
"""Of a meter: whose, and of what."""


class OverLimitError(Exception):
    """`subject` may not have `amount` more of `kind` now."""

    def __init__(self, subject: str, kind: Kind, limit: float, amount: int, wait_s: int | None) -> None:
        super().__init__(f"{subject}: {amount} {kind} more would exceed {limit:g}")
        self.subject, self.kind, self.limit, self.amount = subject, kind, limit, amount
        self.wait_s = wait_s
        """Seconds until there may be room; 0 when that is up to requests that run, None when there never will be."""


class ShareError(Exception):
    """The limits have room for an amount, but this server's shares of them do not."""

    def __init__(self, wanted: Mapping[Key, tuple[float, int]]) -> None:
        super().__init__(", ".join(f"{subject}: {kind}" for subject, kind in wanted))
        self.wanted = wanted
        """Limit and amount of each meter whose share is too small."""


@dataclass(slots=True)
class Meter:
    """One quantity of one subject."""

    share: float = math.inf
    """How much of the limit this server may use; without replicas all of it."""
    until: float = math.inf
    """When it may use no more of its share (seconds)."""
    limit: float = math.inf
    """The limit, as the last request had it."""
    held: int = 0
    """Reserved for requests that run."""
    spent: deque[tuple[int, int]] = field(default_factory=deque)
    """What was settled within the last minute, by second: when that ended, and the amount."""
    total: int = 0
    """All amounts of `spent`."""

    @property
    def used(self) -> int:
        """What counts against the limit."""
        return self.held + self.total

    def forget_old(self, now: float) -> None:
        """Take out what was used more than a minute before `now` (seconds)."""
        while self.spent and self.spent[0][0] + WINDOW_S <= now:
            self.total -= self.spent.popleft()[1]

    def spend(self, amount: int, now: float) -> None:
        """Count what was used until `now`."""
        if amount:
            end = math.floor(now) + 1
            before = self.spent.pop()[1] if self.spent and self.spent[-1][0] == end else 0
            self.spent.append((end, before + amount))
            self.total += amount

    def wait_s(self, room: float, now: float) -> int:
        """Seconds until at most `room` counts, if nothing more is used; 0 when that is up to requests that run."""
        counted = self.used
        for end, amount in self.spent:
            counted -= amount
            if counted <= room:
                return math.ceil(end + WINDOW_S - now)
        return 0


@dataclass(slots=True)
class Hold:
    """An amount that is reserved until `settle`."""

    amount: int
    meters: list[Meter]
    now: Callable[[], float]

    def settle(self, used: int) -> None:
        """Count `used` in the place of the reserved amount; the first call counts."""
        for meter in self.meters:
            meter.held -= self.amount
            meter.spend(used, self.now())
        self.meters = []


@dataclass(frozen=True, slots=True)
class Standing:
    """How far one limit is used: how much may be taken now, and when all of it may be (seconds)."""

    limit: float
    remaining: int
    reset_s: int


class Ledger:
    """The meters of all subjects. Its methods belong to one event loop, and never wait."""

    def __init__(self, *, share: float = math.inf, now: Callable[[], float] = time.monotonic) -> None:
        """`share` is what a server may use of each limit before it has asked for more; `now` gives seconds."""
        self.meters: dict[Key, Meter] = {}
        self._share, self._now = share, now

    def find(self, key: Key) -> Meter:
        """The meter of a quantity, made when there is none, as of now."""
        if (meter := self.meters.get(key)) is None:
            meter = self.meters[key] = Meter(self._share)
        meter.forget_old(self._now())
        return meter

    def forget_idle(self) -> None:
        """Forget the meters that count nothing."""
        for key in list(self.meters):
            meter = self.meters[key]
            meter.forget_old(self._now())
            if not meter.used and meter.share in (0, math.inf):
                del self.meters[key]

    def find_room(self, key: Key) -> float:
        """What of this server's share is left now."""
        meter = self.find(key)
        return (meter.share if self._now() < meter.until else 0) - meter.used

    def take(self, kind: Kind, limits: Mapping[str, float], amount: int) -> Hold:
        """Reserve `amount` under the limits of all subjects, or none of it.

        `OverLimitError` when one of them has no room, `ShareError` when only this server's share of one has none.
        """
        if len(self.meters) > MAX_METERS:
            self.forget_idle()
        meters = {(subject, kind): (limit, self.find((subject, kind))) for subject, limit in limits.items()}
        for (subject, _), (limit, meter) in meters.items():
            if meter.used + amount > limit:
                wait_s = None if amount > limit else meter.wait_s(limit - amount, self._now())
                raise OverLimitError(subject, kind, limit, amount, wait_s)
        if short := {key: (limit, amount) for key, (limit, _) in meters.items() if self.find_room(key) < amount}:
            raise ShareError(short)
        for limit, meter in meters.values():
            meter.limit = limit
            meter.held += amount
        return Hold(amount, [meter for _, meter in meters.values()], self._now)

    def list_used(self) -> list[tuple[tuple[str, Kind], float]]:
        """Of the limits of all keys, and of all tenants, of each kind the one that is used most: which part of it. May
        be called in any thread.
        """
        since, most = self._now() - WINDOW_S, dict[tuple[str, Kind], float]()
        for (subject, kind), meter in list(self.meters.items()):
            if meter.limit < math.inf:
                used = meter.held + sum(amount for end, amount in meter.spent.copy() if end > since)
                key = subject.split(" ", 1)[0], kind
                most[key] = max(most.get(key, 0.0), used / meter.limit)
        return [*most.items()]

    def look(self, kind: Kind, limits: Mapping[str, float]) -> Standing | None:
        """How far the limit is used that has the least left; None without one."""
        standings = []
        for subject, limit in limits.items():
            meter = self.find((subject, kind))
            last = meter.spent[-1][0] + WINDOW_S - self._now() if meter.spent else 0
            reset_s = max(math.ceil(last), WINDOW_S if meter.held else 0)
            standings.append(
                Standing(limit, max(0, int(min(limit - meter.used, self.find_room((subject, kind))))), reset_s)
            )
        return min(standings, key=lambda standing: standing.remaining, default=None)
