"""Stacks and builds in the engine, by key: made once, leased, unloaded when room is needed.

While a resident has leases it is neither unloaded nor its files deleted. It is made off the event loop. Room comes
from unloading what has no leases and is not pinned, least recently used first; those who need it get it in turn. What
is in use serves new requests at once, before those who wait for a place, but not for ever: when one of them has waited
for long, what was loaded first serves no new ones, and goes when it is idle. The caller decides what is made.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any, Literal

from service.attempts import Attempt, Attempts, Making
from service.build_files import BuildFiles
from service.errors import ApiError, hide_paths
from service.evictions import Evictions, Loader, Reason, Resident
from service.metrics import Metrics
from service.places import Places
from service.tracing import traced, traces

Source = Literal["warm", "loaded", "built"]
"""Where a request's fusion came from: the engine, the store, or built now."""
ADAPTER = "adapter"  # in a store entry: the PEFT folder, beside the report
REPORT = "report.json"
MAX_FAILURES = 1000
ENGINE_TIMEOUT_S = 120.0
"""How long the engine may take to load or unload; a busy one takes seconds."""
PATIENCE = 0.25
"""Of the time that a request may wait, after which what is never idle has to make way for it."""
log = logging.getLogger("fusion")


class Residency:
    """Residents of one engine. All methods run on the event loop; files are read and written in threads."""

    def __init__(
        self,
        engine: Loader,
        files: BuildFiles,
        metrics: Metrics,
        *,
        capacity: int,
        max_waiting: int,
        wait_timeout_s: float,
    ) -> None:
        self.residents: dict[str, Resident] = {}
        self.list_pinned: Callable[[], Collection[str]] = tuple
        """The keys of what stays while there is other room, set by what knows."""
        self.evictions = Evictions()
        self.failures: dict[str, str] = {}
        """Why the last attempt failed, by key; the newest `MAX_FAILURES`."""
        self._engine = engine
        self._files = files
        self._metrics = metrics
        self._draining: list[Resident] = []
        self._places = Places(capacity)
        self._tasks: set[asyncio.Task[None]] = set()
        self._discarded: set[str] = set()
        """Keys whose files go once they are unloaded."""
        self._freeing = 0
        """Places that are about to be given back."""
        self._attempts = Attempts(
            self._make, self._deliver, self.release, metrics, max_waiting=max_waiting, timeout_s=wait_timeout_s
        )
        self._patience_s = PATIENCE * wait_timeout_s
        files.in_use, files.evict_idle = self._list_keys, lambda: self._evict_idle("disk")

    async def acquire(self, making: Making, *, timeout_s: float | None = None) -> tuple[Resident, Source]:
        """Make the resident if it is not there, and hold it until `release`; says how it came.

        `ApiError` 503 when too many requests wait, or this one has waited for `timeout_s` (the time that requests
        have).
        """
        source: Source = "warm"
        resident = self.residents.get(making.key)
        if resident is None:
            resident, is_new = await self._attempts.wait(making, timeout_s=timeout_s)
            source = "built" if is_new else "loaded"
        else:
            resident.leases += 1
        resident.last_used = time.monotonic()
        self._metrics.record_lookup(source)
        return resident, source

    def check_room(self) -> None:
        """Raise `ApiError` 503 when no further request may wait."""
        self._attempts.check_room()

    def release(self, resident: Resident) -> None:
        """Give back what `acquire` returned."""
        resident.leases -= 1
        resident.last_used = time.monotonic()
        if resident.leases == 0:
            if resident in self._draining:
                self._draining.remove(resident)
                self._unload(resident)
            self._free_places(self._places.wanted)

    def count_used(self, besides: Resident) -> int:
        """How many residents have leases, one aside."""
        used = [*self.residents.values(), *self._draining]
        return sum(resident.leases > 0 and resident is not besides for resident in used)

    @property
    def attempts(self) -> list[Attempt[Resident]]:
        """What is being made or loaded, oldest first."""
        return self._attempts.under_way

    @property
    def draining(self) -> list[Resident]:
        """What no new request gets, and that running ones still use."""
        return list(self._draining)

    def count_room(self) -> int:
        """How many places are free, or held by what is idle and would make way."""
        return self._places.free + len(self._list_idle())

    def state(self, key: str) -> tuple[str, str | None]:
        """`warm`, `queued`, `fusing`, `loading`, `evicted` (made when asked for) or `failed` and why."""
        if key in self.residents:
            return "warm", None
        if (stage := self._attempts.stages.get(key)) is not None:
            return ("queued" if stage == "in line" else stage), None
        return ("failed", self.failures[key]) if key in self.failures else ("evicted", None)

    def retire(self, keys: Collection[str]) -> None:
        """Give the residents under `keys` to no new request; running requests finish on theirs."""
        for resident in [self.residents[key] for key in keys if key in self.residents]:
            self._evict(resident, "gone")

    def discard(self, keys: Collection[str]) -> None:
        """As `retire`, and delete their files when nothing uses them any more, also of those that are not resident."""
        loaded = {*self.residents, *(resident.key for resident in self._draining)}
        self._discarded.update(loaded.intersection(keys))
        self.retire(keys)
        for key in set(keys) - loaded:
            self._start(self._delete(key))

    async def _delete(self, key: str) -> None:
        try:
            await self._files.remove(key)
        except Exception as error:  # the store's budget evicts it later
            log.warning("files of a stack or build were left behind: %s", error)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _make(self, attempt: Attempt[Resident]) -> Resident | None:
        path = await self._land(attempt)
        report = json.loads(await self._files.read(path / REPORT))
        if not attempt.waiters:
            self._attempts.drop(attempt)
            return None
        attempt.stage = "in line"
        if not self._places.free:
            self._free_places(self._places.wanted + 1)
        timer = asyncio.get_running_loop().call_later(self._patience_s, self._drain)
        try:
            await self._places.take()
        finally:
            timer.cancel()
        attempt.stage = "loading"
        try:
            return await self._load(attempt.making, path, report)
        except BaseException:
            self._give_back_place()
            raise

    async def _land(self, attempt: Attempt[Resident]) -> Path:
        making = attempt.making
        if (path := await self._files.find(making.key)) is not None:
            return path

        def write(entry: Path) -> None:
            attempt.stage = "fusing"
            making.write(entry)

        async with self._files.turn(making.key) as path:
            if path is not None:
                return path
            started = time.monotonic()
            try:
                async with making.hold():
                    with traces.span("fuse"):
                        path = await self._files.land(making.key, write)
            except Exception:
                self._metrics.record_build(making.kind, "failed", time.monotonic() - started)
                raise
        self._metrics.record_build(making.kind, "built", time.monotonic() - started)
        attempt.is_new = True
        return path

    @traced("load")
    async def _load(self, making: Making, path: Path, report: Mapping[str, Any]) -> Resident:
        started = time.monotonic()
        try:
            async with asyncio.timeout(ENGINE_TIMEOUT_S):
                request = await self._engine.load(path / ADAPTER, f"~{making.kind}/{making.key}")
        except Exception as error:
            message = f"The engine could not load a {making.kind}: {hide_paths(str(error)) or type(error).__name__}"
            raise ApiError(500, message) from error
        self._metrics.record_load(time.monotonic() - started)
        loss, widths = report.get("error", 0.0), report.get("widths", {})
        return Resident(making.key, making.kind, path, request, report["rank"], loss, widths)

    def _deliver(self, key: str, resident: Resident | None, error: BaseException | None, waiters: int) -> None:
        """Take in the outcome of an attempt: a resident, with a lease for each who waits for it, or a failure."""
        if resident is not None:
            resident.leases = waiters
            self.residents[key] = resident
            self.failures.pop(key, None)
            self._update_metrics()
            self._free_places(self._places.wanted)
        elif error is not None and not (isinstance(error, ApiError) and error.status == 503):  # a busy server's
            self.failures[key] = hide_paths(str(error.__cause__ or "") or str(error))
            if len(self.failures) > MAX_FAILURES:
                del self.failures[next(iter(self.failures))]

    def _free_places(self, wanted: int) -> None:
        """Evict idle residents, least recently used first, until `wanted` places are being freed or none is idle."""
        while self._freeing < wanted and self._evict_idle("room"):
            pass

    def _list_idle(self) -> list[Resident]:
        """What makes way at once when a place is needed."""
        pinned = self.list_pinned()
        return [
            resident for resident in list(self.residents.values()) if not resident.leases and resident.key not in pinned
        ]

    def _evict_idle(self, reason: Reason) -> bool:
        """Evict the idle resident that was used longest ago; False when there is none."""
        idle = self._list_idle()
        if idle:
            self._evict(min(idle, key=lambda resident: resident.last_used), reason)
        return bool(idle)

    def _drain(self) -> None:
        """Have what was loaded first serve no new requests, so that those who wait for a place get one."""
        pinned = self.list_pinned()
        busy = [resident for resident in self.residents.values() if resident.leases and resident.key not in pinned]
        if busy and self._freeing + len(self._draining) < self._places.wanted:
            self._evict(min(busy, key=lambda resident: resident.loaded), "room")

    def _find_first(self) -> str | None:
        """The key of what gets the next place that nobody has been promised."""
        line = [attempt.making.key for attempt in self.attempts if attempt.stage == "in line"]
        promised = self._freeing + len(self._draining)
        return line[promised] if promised < len(line) else None

    def _evict(self, resident: Resident, reason: Reason) -> None:
        """Unload a resident when it is idle; its files stay in the store until that needs room."""
        self.evictions.record(resident, reason, self._find_first() if reason == "room" else None)
        # First no request finds it, then the engine forgets it.
        del self.residents[resident.key]
        self._update_metrics()
        self._metrics.evictions.labels(resident.kind, reason).inc()
        if resident.leases:
            self._draining.append(resident)
        else:
            self._unload(resident)

    def _unload(self, resident: Resident) -> None:
        self._freeing += 1
        self._start(self._unload_and_free(resident))

    async def _unload_and_free(self, resident: Resident) -> None:
        try:
            async with asyncio.timeout(ENGINE_TIMEOUT_S):
                await self._engine.unload(resident.request)
        except Exception as error:
            # Its place is free all the same: no request names it again, and an engine over its limit drops what it
            # used longest ago.
            log.warning("the engine did not unload a %s: %s", resident.kind, error or type(error).__name__)
        finally:
            self._freeing -= 1
            self._give_back_place()
        if resident.key in self._discarded:
            self._discarded.remove(resident.key)
            await self._delete(resident.key)

    def _give_back_place(self) -> None:
        self._places.give_back()
        self._free_places(self._places.wanted)

    def _list_keys(self) -> set[str]:
        """The keys whose files are in use."""
        return {*self.residents, *self._attempts.stages, *(resident.key for resident in self._draining)}

    def _update_metrics(self) -> None:
        for kind in ("stack", "build"):
            self._metrics.set_resident(kind, sum(r.kind == kind for r in self.residents.values()))
