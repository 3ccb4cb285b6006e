"""Lease fusions: `placement` chooses where, `residency` loads and holds."""

from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from adapters import STRICT_TOLERANCE
from service.attempts import Making
from service.client_turns import ClientTurns
from service.clients import ClientPlaces
from service.engine.weights import Weights
from service.errors import ApiError
from service.evictions import Eviction, Resident
from service.functions import Functions, Spans
from service.materializer import Materializer
from service.occupancy import Occupancy, survey
from service.placement import Group, Home, Limits, Placement, find_home, home_key, place
from service.residency import Residency, Source
from service.resolve import Fusion
from service.tracing import traced

Check = Callable[[], Awaitable[None]]
OWN_TIMEOUT_S = 600.0
"""How long the server itself waits, for what it warms at startup."""
MAX_MADE = 4096
"""Stacks and builds of which the pool knows the adapters, when these go."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A request's hold on its stack or build."""

    resident: Resident
    source: Source
    weights: Spans | Weights | None
    """Mixed: those of each coordinate range, or functions; None when built."""
    rank: int
    client: str | None = None
    """Whose place it takes; None: the server's own."""

    @property
    def mode(self) -> Literal["mixed", "built"]:
        """How the fusion is served."""
        return "built" if self.weights is None else "mixed"


class Pool:
    """Leases fusions. All methods run on the event loop."""

    def __init__(
        self,
        residency: Residency,
        materializer: Materializer,
        limits: Limits,
        functions: Functions,
        groups: Callable[[], Iterable[Group]] = list,
        *,
        clients: ClientPlaces,
        checks: ClientTurns,
        slots: int = 1,
        hold: Callable[[Collection[str]], AbstractAsyncContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        self.limits = limits
        self._residency = residency
        self._materializer = materializer
        self._functions = functions
        self._groups = groups
        self._hold = hold
        """Keeps the files of adapters for a block."""
        self._clients = clients
        self.checks = checks
        """Turns for the checks of requests by vLLM's app."""
        self._slots = slots
        """Stacks and builds that the engine's batch can hold."""
        self._made: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        """The adapters in what was made lately, by key."""

    def place(self, fusion: Fusion) -> Placement:
        """The stack or build that would serve `fusion` now."""
        return place(fusion, self._residency.residents.values(), self._groups(), self.limits)

    def home_key(self, fusion: Fusion) -> str:
        """What routers keep `fusion` together by: see `placement.home_key`."""
        return home_key(fusion, self._groups(), self.limits)

    @property
    def groups(self) -> list[Group]:
        """The declared groups that can be served now."""
        return list(self._groups())

    @property
    def residents(self) -> list[Resident]:
        """The stacks and builds that are in the engine now."""
        return list(self._residency.residents.values())

    def find_resident(self, home: Home) -> Resident | None:
        """What would serve the fusions with this home now, if it is in the engine; the one with the most requests."""
        residents, members = dict(self._residency.residents), home.members
        if members is None:
            return residents.get(home.key)
        holding = [resident for resident in residents.values() if members <= resident.widths.keys()]
        return max(holding, key=lambda resident: resident.leases, default=None)

    def list_making(self) -> dict[str, tuple[str, ...]]:
        """The stacks and builds that are being made or loaded, by key, with their adapters."""
        keys = [attempt.making.key for attempt in self._residency.attempts]
        return {key: self._made.get(key, ()) for key in keys}

    def survey(self) -> Occupancy:
        """What the engine's places hold, and what is on its way there."""
        return survey(self._residency, self._made, self._slots)

    def count_room(self) -> int:
        """How many stacks and builds could be loaded without waiting for a request to end."""
        return self._residency.count_room()

    @asynccontextmanager
    async def lease(self, fusion: Fusion, *, strict: bool = False, client: str | None = None) -> AsyncIterator[Lease]:
        """Make `fusion` resident if it is not, and hold it for the duration of the `with` block."""
        lease = await self.acquire(fusion, strict=strict, client=client)
        try:
            yield lease
        finally:
            self.release(lease)

    @traced("lease")
    async def acquire(
        self, fusion: Fusion, *, strict: bool = False, client: str | None = None, check: Check | None = None
    ) -> Lease:
        """As `lease`, for callers that release by hand; `check` is awaited before anything is made or loaded.

        `ApiError` 400 when `strict` and the build would lose something, 429 when the `client` has too many stacks and
        builds in use, 503 when there is no place in time.
        """
        making = self._plan_making(fusion)
        if check is None or making.key in self._residency.residents:
            return await self._take(fusion, making, strict=strict, client=client)
        self.check_room(fusion, client)
        lease: Lease | None = None
        try:
            async with making.hold():
                async with self.checks.hold(client):
                    await check()
                lease = await self._take(fusion, self._plan_making(fusion), strict=strict, client=client)
        except BaseException:
            if lease is not None:  # the caller has left while files were let go of
                self.release(lease)
            raise
        return lease

    def is_ready(self, fusion: Fusion) -> bool:
        """Whether `fusion` needs nothing made or loaded that is not being made for others already."""
        key = self.place(fusion).key
        return key in self._residency.residents or key in self.list_making()

    def check_room(self, fusion: Fusion, client: str | None) -> None:
        """Raise `ApiError` 429 when the `client` may not use what serves `fusion` now, 503 when too many wait."""
        key = self.place(fusion).key
        if key not in self._residency.residents:
            self._clients.check(client, key)
            self._residency.check_room()

    async def _take(self, fusion: Fusion, making: Making, *, strict: bool, client: str | None) -> Lease:
        self._clients.take(client, making.key)
        resident: Resident | None = None
        try:
            timeout_s = OWN_TIMEOUT_S if client is None else None
            if making.key in self._residency.residents:
                resident, source = await self._residency.acquire(making)
            else:  # whoever waits gets the adapters that the names stood for, even when these go meanwhile
                with self._clients.wait(client):
                    async with making.hold():
                        resident, source = await self._residency.acquire(making, timeout_s=timeout_s)
            lease = await self._make_lease(fusion, resident, source, client)
        except BaseException:
            if resident is not None:  # as above
                self._residency.release(resident)
            self._clients.give_back(client, making.key)
            raise
        if strict and resident.error > STRICT_TOLERANCE:
            self.release(lease)
            raise ApiError(
                400,
                f"{fusion.recipe.format()!r} would lose {resident.error:.2e} of its update at rank "
                f"{resident.rank} and 'strict' is set; raise FUSION_MAX_LORA_RANK (now {self.limits.max_rank}) "
                "or drop 'strict'.",
                param="strict",
            )
        return lease

    async def _make_lease(self, fusion: Fusion, resident: Resident, source: Source, client: str | None) -> Lease:
        if resident.kind == "build":
            return Lease(resident, source, None, resident.rank, client)
        weights = await self._functions.weigh(fusion, resident.widths, client)
        return Lease(resident, source, weights, sum(resident.widths[digest] for digest in fusion.members), client)

    async def check_weights(self, fusion: Fusion, placement: Placement, client: str | None) -> None:
        """Raise `ApiError` 400 for weights that a request could not be served with there: too many bytes, a pattern
        that matches no module.
        """
        if placement.kind == "stack":
            ranks = {**{digest: rank for group in self.groups for digest, rank in group.items()}, **fusion.ranks}
            resident = self._residency.residents.get(placement.key)
            widths = {d: ranks[d] for d in placement.digests} if resident is None else resident.widths
            await self._functions.weigh(replace(fusion, recipe=fusion.recipe.choose({})), widths, client)

    async def weigh(self, lease: Lease, fusion: Fusion) -> Spans | Weights:
        """The weights of `fusion`, whose adapters are all in the stack of `lease`."""
        return await self._functions.weigh(fusion, lease.resident.widths, lease.client)

    def may_wait(self, lease: Lease) -> bool:
        """Whether other stacks and builds, which are in use, may keep this one out of the engine's batch."""
        return self._residency.count_used(lease.resident) >= self._slots

    def release(self, lease: Lease) -> None:
        """Give a lease back."""
        self._clients.give_back(lease.client, lease.resident.key)
        self._residency.release(lease.resident)

    def state(self, fusion: Fusion) -> tuple[str, str | None]:
        """`warm`, `queued`, `fusing`, `loading`, `evicted` (made when asked for) or `failed` and why."""
        return self.home_state(self.find_home(fusion))

    def find_home(self, fusion: Fusion) -> Home:
        """See `placement.find_home`."""
        return find_home(fusion, self.groups, self.limits)

    def home_state(self, home: Home) -> tuple[str, str | None]:
        """As `state`, of all fusions with this home."""
        members = home.members
        if members is not None and any(members <= r.widths.keys() for r in self._residency.residents.values()):
            return "warm", None
        return self._residency.state(home.key)

    def keep_pinned(self, list_pinned: Callable[[], Collection[str]]) -> None:
        """Keep the residents with the keys that `list_pinned` gives, while there is other room."""
        self._residency.list_pinned = list_pinned

    def list_pinned(self) -> Collection[str]:
        """The keys of the residents that stay."""
        return self._residency.list_pinned()

    def find_eviction(self, home: Home) -> Eviction | None:
        """Why what served the fusions with this home is not in the engine any more; None while something does, and
        where nothing ever did.
        """
        return None if self.find_resident(home) else self._residency.evictions.find(home)

    def forget(self, digest: str) -> None:
        """Retire every stack and build containing the adapter `digest`, and delete their files; running requests finish
        on theirs.
        """
        keys = {r.key for r in self._residency.residents.values() if digest in r.widths}
        keys |= {key for key, digests in self._made.items() if digest in digests}
        for key in keys:
            self._made.pop(key, None)
        self._residency.discard(keys)

    def _plan_making(self, fusion: Fusion) -> Making:
        placement = self.place(fusion)
        if placement.kind == "stack":
            write = partial(self._materializer.write_stack, placement.digests)
        else:
            write = partial(self._materializer.write_build, fusion)
        if placement.key not in self._residency.residents:
            self._made[placement.key] = placement.digests
            if len(self._made) > MAX_MADE:
                self._made.popitem(last=False)
        return Making(placement.key, placement.kind, write, partial(self._hold, placement.digests))
