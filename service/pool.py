"""What is resident in the engine: stacks, which serve any weighted sum of their adapters, and builds.

A request takes a lease; while leases are out nothing under them is unloaded or unlinked. Making something
resident happens once per key however many requests wait, off the event loop, and outlives a request that
goes away. Room is made by unloading what has no leases, least recently used first.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol

from adapters import LoraAdapter, Recipe, Stack, Store, fuse, load, save, stack
from service.errors import ApiError
from service.resolve import Fusion

log = logging.getLogger(__name__)

Source = Literal["warm", "loaded", "built"]
ADAPTER = "adapter"  # in a store entry: the PEFT folder, beside the report
REPORT = "report.json"
MAX_FAILURES = 1000


class Loader(Protocol):
    """The part of the engine the pool needs."""

    async def load(self, path: Path, name: str) -> object: ...
    async def unload(self, request: object) -> None: ...


@dataclass(slots=True, eq=False)
class Resident:
    """A stack or a build that the engine holds."""

    key: str
    kind: Literal["stack", "build"]
    path: Path
    request: object
    rank: int
    error: float = 0.0
    widths: Mapping[str, int] = field(default_factory=dict)
    """Stacks: width of each member's coordinate range, by digest, in order."""
    leases: int = 0
    used: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Lease:
    """What answers one request."""

    resident: Resident
    source: Source
    spans: tuple[tuple[int, float], ...] | None
    """Mixed: (width, weight) of each coordinate range; None when built."""
    rank: int

    @property
    def mode(self) -> Literal["mixed", "built"]:
        """How the fusion is served."""
        return "built" if self.spans is None else "mixed"


class Counter(Protocol):
    """Metrics the pool reports to."""

    def landed(self, kind: str, outcome: str, build_s: float) -> None: ...
    def loaded(self, seconds: float) -> None: ...
    def hit(self, source: Source) -> None: ...
    def resident_now(self, kind: str, count: int) -> None: ...


def stack_key(digests: tuple[str, ...]) -> str:
    """Store key of the stack of these adapters."""
    return sha256(("stack/1/" + "/".join(sorted(digests))).encode()).hexdigest()


class Pool:
    """Residents of one engine. All methods run on the event loop; files and algebra in threads."""

    def __init__(
        self,
        engine: Loader,
        store: Store,
        sources: Callable[[str], Path],
        metrics: Counter,
        *,
        capacity: int,
        max_rank: int,
        mixing: bool,
        groups: Callable[[], list[tuple[str, ...]]] = list,
    ) -> None:
        self.engine = engine
        self.store = store
        self.mixing = mixing
        self.max_rank = max_rank
        self.residents: dict[str, Resident] = {}
        self.states: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        """Why the last attempt failed, by key; the newest `MAX_FAILURES`."""
        self._sources = sources
        self._metrics = metrics
        self._capacity = capacity
        self._groups = groups
        self._retired: list[Resident] = []
        self._making: dict[str, asyncio.Task[tuple[Resident, Source]]] = {}
        self._room = asyncio.Condition()
        self._loading = asyncio.Lock()
        self._storing = asyncio.Lock()
        """Held while files are looked up or evicted: what was found must not be deleted before it is loaded."""
        self._ranks: dict[str, int] = {}

    def rank(self, digest: str) -> int:
        """Largest rank of a stored adapter in any module."""
        if digest not in self._ranks:
            config = json.loads((self._sources(digest) / "adapter_config.json").read_text())
            self._ranks[digest] = max([config["r"], *config.get("rank_pattern", {}).values()])
        return self._ranks[digest]

    def why_built(self, fusion: Fusion) -> str | None:
        """Why `fusion` cannot be served mixed, or None when it can: a plain sum that fits one stack."""
        if not self.mixing:
            return "mixing is off on this server"
        if not fusion.recipe.is_sum:
            what = "a schedule over layers" if fusion.recipe.method == "sum" else repr(fusion.recipe.method)
            return f"{what} is no plain sum"
        rank = sum(self.rank(d) for d in set(fusion.parents.values()))
        if rank > self.max_rank:
            return f"the adapters' ranks add up to {rank}, over FUSION_MAX_LORA_RANK={self.max_rank}"
        return None

    def stackable(self, fusion: Fusion) -> bool:
        """Whether `fusion` can be served mixed."""
        return self.why_built(fusion) is None

    def _group(self, members: set[str]) -> tuple[str, ...] | None:
        """The declared group that holds `members` and fits."""
        for group in self._groups():
            if members <= set(group) and sum(self.rank(d) for d in group) <= self.max_rank:
                return tuple(sorted(group))
        return None

    def _stack_of(self, members: set[str]) -> tuple[str, tuple[str, ...]]:
        """The key and the adapters of the stack that serves `members`, resident or not.

        That of the declared group; else, of the resident ones that hold the members, the one with the most running
        requests, since the engine batches few stacks at once and one runs fastest; of idle ones the smallest.
        """
        group = self._group(members)
        if group is None:
            holding = [r for r in self.residents.values() if members <= set(r.widths)]
            if holding:
                best = min(holding, key=lambda r: (-r.leases, r.rank, r.key))
                return best.key, tuple(best.widths)
        digests = group or tuple(sorted(members))
        return stack_key(digests), digests

    @asynccontextmanager
    async def lease(self, fusion: Fusion, *, strict: bool = False) -> AsyncIterator[Lease]:
        """Make `fusion` resident if it is not, and hold it for the time of the `with` block."""
        lease = await self.acquire(fusion, strict=strict)
        try:
            yield lease
        finally:
            await self.release(lease)

    async def acquire(self, fusion: Fusion, *, strict: bool = False) -> Lease:
        """As `lease`, for callers that release by hand."""
        if self.stackable(fusion):
            return await self._mixed(fusion)
        return await self._built(fusion, strict)

    async def _mixed(self, fusion: Fusion) -> Lease:
        members = set(fusion.parents.values())
        key, digests = self._stack_of(members)
        resident = self.residents.get(key)
        source: Source = "warm"
        if resident is not None:
            self._hold(resident)
        else:
            resident, source = await self._once(key, lambda: self._make_stack(key, digests))
        self._metrics.hit(source)
        weights = dict.fromkeys(resident.widths, 0.0)
        for name, weight in fusion.recipe.weights.items():
            assert isinstance(weight, float)  # a plain sum has no schedules
            weights[fusion.parents[name]] += weight
        spans = tuple((width, weights[d]) for d, width in resident.widths.items())
        return Lease(resident, source, spans, sum(resident.widths[d] for d in members))

    async def _built(self, fusion: Fusion, strict: bool) -> Lease:
        key = self._build_key(fusion)
        resident = self.residents.get(key)
        source: Source = "warm"
        if resident is not None:
            self._hold(resident)
        else:
            resident, source = await self._once(key, lambda: self._make_build(key, fusion))
        if strict and resident.error > 1e-6:
            await self._release(resident)
            raise ApiError(
                400,
                f"{fusion.recipe.format()!r} would lose {resident.error:.2e} of its update at rank "
                f"{resident.rank} and 'strict' is set; raise FUSION_MAX_LORA_RANK (now {self.max_rank}) "
                "or drop 'strict'.",
                param="strict",
            )
        self._metrics.hit(source)
        return Lease(resident, source, None, resident.rank)

    def _build_key(self, fusion: Fusion) -> str:
        return sha256(f"build/1/{fusion.digest}/{self.max_rank}".encode()).hexdigest()

    async def _once(
        self, key: str, make: Callable[[], Coroutine[Any, Any, tuple[Resident, Source]]]
    ) -> tuple[Resident, Source]:
        task = self._making.get(key)
        if task is None:
            task = asyncio.create_task(make())
            self._making[key] = task
            task.add_done_callback(lambda _: self._making.pop(key, None))
        # Shielded: the others still want it when this request goes away.
        resident, source = await asyncio.shield(task)
        if self.residents.get(key) is not resident:  # evicted between landing and here
            return await self._once(key, make)
        self._hold(resident)
        return resident, source

    def _hold(self, resident: Resident) -> None:
        resident.leases += 1
        resident.used = time.monotonic()

    async def release(self, lease: Lease) -> None:
        """Give a lease back."""
        await self._release(lease.resident)

    async def _release(self, resident: Resident) -> None:
        resident.leases -= 1
        resident.used = time.monotonic()
        if resident.leases == 0:
            if resident in self._retired:
                self._retired.remove(resident)
                await self.engine.unload(resident.request)
            async with self._room:
                self._room.notify_all()

    async def _make_stack(self, key: str, digests: tuple[str, ...]) -> tuple[Resident, Source]:
        def write(folder: Path) -> None:
            made: Stack = stack({d: load(self._sources(d)) for d in digests})
            save(made.adapter, folder / ADAPTER)
            widths = {d: stop - start for d, (start, stop) in made.ranges.items()}
            (folder / REPORT).write_text(json.dumps({"widths": widths, "rank": made.rank}))

        path, source = await self._land(key, "stack", write)
        report = json.loads((path / REPORT).read_text())
        widths = {str(d): int(w) for d, w in report["widths"].items()}
        return await self._load(key, "stack", path, report["rank"], 0.0, widths), source

    async def _make_build(self, key: str, fusion: Fusion) -> tuple[Resident, Source]:
        def write(folder: Path) -> None:
            built, report = self.fuse(fusion.recipe, fusion.parents, self.max_rank)
            provenance = {"recipe": fusion.recipe.format(), "digest": fusion.digest}
            save(built, folder / ADAPTER, provenance=provenance)
            (folder / REPORT).write_text(json.dumps(report))

        path, source = await self._land(key, "build", write)
        report = json.loads((path / REPORT).read_text())
        return await self._load(key, "build", path, report["rank"], report["error"], {}), source

    def fuse(
        self, recipe: Recipe, parents: Mapping[str, str], max_rank: int | None
    ) -> tuple[LoraAdapter, dict[str, object]]:
        """Materialise a recipe from the stored parents (blocks: call in a thread)."""
        built, report = fuse(recipe, {n: load(self._sources(d)) for n, d in parents.items()}, max_rank=max_rank)
        return built, report.to_json()

    async def _land(self, key: str, kind: str, write: Callable[[Path], None]) -> tuple[Path, Source]:
        async with self._storing:
            found = self.store.get(key)
        if found is not None:
            return found, "loaded"
        started = time.monotonic()
        self.states[key] = "fusing"
        try:
            path = await asyncio.to_thread(self.store.land, key, write)
        except Exception as error:
            self._failed(key, error)
            self._metrics.landed(kind, "failed", time.monotonic() - started)
            raise
        self._metrics.landed(kind, "built", time.monotonic() - started)
        async with self._storing:
            keep = {*self.residents, *self._making, *(r.key for r in self._retired)}
            await asyncio.to_thread(self.store.evict, keep)
        return path, "built"

    async def _load(
        self,
        key: str,
        kind: Literal["stack", "build"],
        path: Path,
        rank: int,
        error: float,
        widths: Mapping[str, int],
    ) -> Resident:
        self.states[key] = "loading"
        async with self._loading:
            await self._make_room()
            started = time.monotonic()
            try:
                request = await self.engine.load(path / ADAPTER, f"~{kind}/{key}")
            except Exception as error_:
                self._failed(key, error_)
                raise ApiError(500, f"The engine could not load a {kind}: {error_}") from error_
            self._metrics.loaded(time.monotonic() - started)
        resident = Resident(key, kind, path, request, rank, error, widths)
        self.residents[key] = resident
        self.states.pop(key, None)
        self.failures.pop(key, None)
        self._count()
        return resident

    def _failed(self, key: str, error: Exception) -> None:
        self.states.pop(key, None)
        self.failures[key] = str(error)
        if len(self.failures) > MAX_FAILURES:
            del self.failures[next(iter(self.failures))]

    def _count(self) -> None:
        for kind in ("stack", "build"):
            self._metrics.resident_now(kind, sum(r.kind == kind for r in self.residents.values()))

    async def _make_room(self) -> None:
        async with self._room:
            while len(self.residents) + len(self._retired) >= self._capacity:
                idle = [r for r in self.residents.values() if r.leases == 0]
                if not idle:
                    await self._room.wait()
                    continue
                await self._evict(min(idle, key=lambda r: r.used))

    async def _evict(self, resident: Resident) -> None:
        # First it is no longer found, then the engine forgets it; the file goes when the store needs room.
        del self.residents[resident.key]
        self._count()
        await self.engine.unload(resident.request)

    def state(self, fusion: Fusion) -> tuple[str, str | None]:
        """`warm`, `queued`, `fusing`, `loading`, `evicted` (made when asked for) or `failed` and why."""
        if self.stackable(fusion):
            key, _ = self._stack_of(set(fusion.parents.values()))
        else:
            key = self._build_key(fusion)
        if key in self.residents:
            return "warm", None
        if key in self.failures and key not in self._making:
            return "failed", self.failures[key]
        return self.states.get(key, "queued" if key in self._making else "evicted"), None

    async def forget(self, digest: str) -> None:
        """No new request gets a stack that holds the adapter `digest`; those that run finish on theirs."""
        for resident in [r for r in self.residents.values() if digest in r.widths]:
            if self.residents.get(resident.key) is not resident:
                continue  # evicted meanwhile, and perhaps loaded anew
            if resident.leases:
                del self.residents[resident.key]
                self._retired.append(resident)
                self._count()
            else:
                await self._evict(resident)
