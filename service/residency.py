"""Stacks and builds in the engine, by key: made once, leased, unloaded when room is needed.

While a resident has leases it is neither unloaded nor its files deleted. It is made once per key, however many
requests wait, off the event loop, and making it outlives a request that goes away. Room comes from unloading what
has no leases, least recently used first. The caller decides what is made.
"""

import asyncio
import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from adapters import Store
from service.errors import ApiError
from service.metrics import Metrics
from service.placement import Kind

Source = Literal["warm", "loaded", "built"]
"""Where a request's fusion came from: the engine, the store, or built now."""
ADAPTER = "adapter"  # in a store entry: the PEFT folder, beside the report
REPORT = "report.json"
MAX_FAILURES = 1000


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


class Residency:
    """Residents of one engine. All methods run on the event loop; files are read and written in threads."""

    def __init__(self, engine: Loader, store: Store, metrics: Metrics, *, capacity: int) -> None:
        self.residents: dict[str, Resident] = {}
        self.states: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        """Why the last attempt failed, by key; the newest `MAX_FAILURES`."""
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._capacity = capacity
        self._draining: list[Resident] = []
        self._tasks: dict[str, asyncio.Task[Source]] = {}
        self._room = asyncio.Condition()
        self._load_lock = asyncio.Lock()
        self._store_lock = asyncio.Lock()
        """Held while files are looked up or evicted: what was found must not be deleted before it is loaded."""

    async def acquire(self, key: str, kind: Kind, write: Callable[[Path], None]) -> tuple[Resident, Source]:
        """Make `key` resident if it is not, and hold it until `release`; says how it came.

        `write` fills a store entry (the adapter folder and the report) where the store has none; it runs in a thread.
        """
        source: Source = "warm"
        while (resident := self.residents.get(key)) is None:  # again when evicted between landing and here
            task = self._tasks.get(key)
            if task is None:
                task = asyncio.create_task(self._make(key, kind, write))
                self._tasks[key] = task
                task.add_done_callback(lambda _: self._tasks.pop(key, None))
            # Shielded: the others still want it when this request goes away.
            source = await asyncio.shield(task)
        resident.leases += 1
        resident.last_used = time.monotonic()
        self._metrics.record_lookup(source)
        return resident, source

    async def release(self, resident: Resident) -> None:
        """Give back what `acquire` returned."""
        resident.leases -= 1
        resident.last_used = time.monotonic()
        if resident.leases == 0:
            if resident in self._draining:
                self._draining.remove(resident)
                await self._engine.unload(resident.request)
            async with self._room:
                self._room.notify_all()

    def state(self, key: str) -> tuple[str, str | None]:
        """`warm`, `queued`, `fusing`, `loading`, `evicted` (made when asked for) or `failed` and why."""
        if key in self.residents:
            return "warm", None
        if key in self.failures and key not in self._tasks:
            return "failed", self.failures[key]
        return self.states.get(key, "queued" if key in self._tasks else "evicted"), None

    async def retire(self, keys: Collection[str]) -> None:
        """Give the residents under `keys` to no new request; running requests finish on theirs."""
        for resident in [self.residents[key] for key in keys if key in self.residents]:
            if self.residents.get(resident.key) is not resident:
                continue  # evicted meanwhile, and perhaps loaded anew
            if resident.leases:
                del self.residents[resident.key]
                self._draining.append(resident)
                self._update_metrics()
            else:
                await self.evict(resident)

    async def evict(self, resident: Resident) -> None:
        """Unload an idle resident; its files stay in the store until that needs room."""
        # First no request finds it, then the engine forgets it.
        del self.residents[resident.key]
        self._update_metrics()
        await self._engine.unload(resident.request)

    async def _make(self, key: str, kind: Kind, write: Callable[[Path], None]) -> Source:
        path, source = await self._land(key, kind, write)
        report = json.loads(await asyncio.to_thread((path / REPORT).read_text))
        await self._load(key, kind, path, report)
        return source

    async def _land(self, key: str, kind: Kind, write: Callable[[Path], None]) -> tuple[Path, Source]:
        async with self._store_lock:
            path = self._store.get(key)
        if path is not None:
            return path, "loaded"
        started = time.monotonic()
        self.states[key] = "fusing"
        try:
            path = await asyncio.to_thread(self._store.land, key, write)
        except Exception as error:
            self._record_failure(key, error)
            self._metrics.record_build(kind, "failed", time.monotonic() - started)
            raise
        self._metrics.record_build(kind, "built", time.monotonic() - started)
        async with self._store_lock:
            keep = {*self.residents, *self._tasks, *(r.key for r in self._draining)}
            await asyncio.to_thread(self._store.evict, keep)
        return path, "built"

    async def _load(self, key: str, kind: Kind, path: Path, report: Mapping[str, Any]) -> None:
        self.states[key] = "loading"
        async with self._load_lock:
            await self._make_room()
            started = time.monotonic()
            try:
                request = await self._engine.load(path / ADAPTER, f"~{kind}/{key}")
            except Exception as error:
                self._record_failure(key, error)
                raise ApiError(500, f"The engine could not load a {kind}: {error}") from error
            self._metrics.record_load(time.monotonic() - started)
        widths = report.get("widths", {})
        self.residents[key] = Resident(key, kind, path, request, report["rank"], report.get("error", 0.0), widths)
        self.states.pop(key, None)
        self.failures.pop(key, None)
        self._update_metrics()

    async def _make_room(self) -> None:
        async with self._room:
            while len(self.residents) + len(self._draining) >= self._capacity:
                idle = [r for r in self.residents.values() if r.leases == 0]
                if idle:
                    await self.evict(min(idle, key=lambda r: r.last_used))
                else:
                    await self._room.wait()

    def _record_failure(self, key: str, error: Exception) -> None:
        self.states.pop(key, None)
        self.failures[key] = str(error)
        if len(self.failures) > MAX_FAILURES:
            del self.failures[next(iter(self.failures))]

    def _update_metrics(self) -> None:
        for kind in ("stack", "build"):
            self._metrics.set_resident(kind, sum(r.kind == kind for r in self.residents.values()))
