"""Register adapters from folders once they prove to have an effect, and remove them."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

from adapters import AdapterError, LoraAdapter, check_name, load, parse
from adapters.files import SHIPPED, adapter_path
from service.adapter_files import AdapterFiles
from service.base_model import Shapes, check_fits
from service.engine.models import LoRARequest, mix_request
from service.engine.overflow import AnswerOverflowError
from service.engine.probe import PROMPT, distance, is_finite
from service.errors import ApiError
from service.pool import Pool
from service.records import AdapterRecord, now
from service.registry import Registry
from service.resolve import Fusion, Names
from service.settings import Settings
from service.validation import MAX_QUOTED
from service.waits import enter, finish

EFFECT_OVER_NOISE = 10
"""A probe must move log-probabilities by this many times the difference of two runs of the base."""
_OVERFLOW = (
    "a probe with the adapter gives numbers that are not finite: expected finite log-probabilities; check lora_alpha "
    "and that the training did not diverge"
)
MAX_ADDING = 2
"""Adapters that are read and stored at once."""
PROBE_TIMEOUT_S = 300.0
"""How long an adapter's place and its probes may take; a busy engine takes seconds."""


def _not_in_roots(text: str) -> ApiError:
    message = f"{text[:MAX_QUOTED]!r} is not a folder inside FUSION_ADAPTER_ROOTS; use one there, or upload a .tar."
    return ApiError(400, message, param="path")


class Prober(Protocol):
    """The part of the engine that shows an adapter's effect."""

    async def probe(self, prompt: Sequence[int], lora: LoRARequest | None) -> list[dict[int, float]]:
        """Log-probabilities of the likeliest tokens after `prompt`, one dict per step."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """Adds and removes adapters, one change of the registry at a time."""

    settings: Settings
    registry: Registry
    names: Names
    pool: Pool
    engine: Prober
    shapes: Shapes
    files: AdapterFiles
    write_lock: asyncio.Lock
    """Held by everything that changes the registry, for the change alone."""
    add_slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_ADDING))
    client_locks: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)
    """Of each client, one registration waits for the slots that all share, or has one."""
    orphans: set[str] = field(default_factory=set)
    """Digests of adapters of which the database did not say whether it has them; their files wait for that."""

    def resolve_path(self, text: str) -> Path:
        """The folder `text` names: in `FUSION_ADAPTER_ROOTS`, symlinks resolved, or `shipped:NAME`; else 400.

        What is outside the roots and what does not exist get one answer. Outside them nothing is looked at.
        """
        if text.startswith(SHIPPED):
            return adapter_path(text)
        roots = [Path(root).resolve() for root in self.settings.adapter_roots]
        named = Path(os.path.abspath(text)) if "\0" not in text else Path("/")
        spelled = [Path(os.path.abspath(root)) for root in self.settings.adapter_roots]
        if not any(named.is_relative_to(root) for root in (*roots, *spelled)):
            raise _not_in_roots(text)
        try:
            path = named.resolve(strict=True)
            inside = list(path.iterdir()) if any(path.is_relative_to(root) for root in roots) else None
        except (OSError, ValueError, RuntimeError):
            inside = None
        if inside is None:
            raise _not_in_roots(text)
        for file in inside:
            if file.is_symlink() and not any(root in file.resolve().parents for root in roots):
                message = f"{file.name!r} in {text[:MAX_QUOTED]!r} is a link out of FUSION_ADAPTER_ROOTS."
                raise ApiError(400, message, param="path")
        return path

    async def add(self, name: str, path: Path, *, client: str | None = None) -> tuple[AdapterRecord, bool]:
        """Register the adapter folder at `path`; returns the record and whether it is new.

        The files are copied into the store, so the source may go; the probe takes a place of `client`. Raises
        `ApiError` 409 when something else has the name, 503 when there is no place in time, `AdapterError` when the
        folder does not hold an adapter of this base, or one that overflows the served dtype or has no effect.
        """
        return await self.add_read(name, partial(load, path), client=client)

    async def add_read(
        self, name: str, read: Callable[[], LoraAdapter], *, client: str | None = None
    ) -> tuple[AdapterRecord, bool]:
        """As `add`, of what `read` returns; it runs in a thread, once more when the disk was full."""
        check_name(name)
        await self.registry.settle()  # nothing is read and stored for a database that does not answer
        timeout_s = self.settings.wait_timeout_s
        async with AsyncExitStack() as holds:
            own = self.client_locks.setdefault(client or "", asyncio.Lock())
            async with (
                enter(own, timeout_s, "other registrations of this client"),
                enter(self.add_slots, timeout_s, "other registrations"),  # tensors of few at once in memory
            ):
                adapter = await self.files.read(read)
                known = self.registry.adapters.get(name)
                is_known = known is not None and known.digest == adapter.digest
                if not is_known:
                    self._check_new(name)
                self._check_served(adapter)
                norm = await self.files.measure(adapter, max_weight=self.settings.max_weight)
                await holds.enter_async_context(self.files.hold([adapter.digest]))
                await self.files.add(adapter)  # a known one too: damaged files are mended
                if known is not None and is_known:
                    return known, False
                record = _describe(name, adapter, norm)
                del adapter
            try:
                return await finish(self._register(await self._prove_effect(record, client)))
            except BaseException:
                if not self.registry.is_current:
                    self.orphans.add(record.digest)
                self._forget(record.digest)
                raise

    async def _register(self, record: AdapterRecord) -> tuple[AdapterRecord, bool]:
        async with self.files.hold([record.digest]), self._write():
            known = self.registry.adapters.get(record.name)
            if known is not None and known.digest == record.digest:
                return known, False
            self._check_new(record.name)
            await self.registry.add_adapter(record)
            return record, True

    async def remove(self, name: str) -> None:
        """Remove an adapter's name, and its files when no other name and no profile needs them.

        409 while a profile uses the adapter and it has no other name: the profile's rank comes from its record.
        Running requests finish first.
        """
        await finish(self._remove(name))

    async def _remove(self, name: str) -> None:
        async with self._write():
            if name in self.registry.snapshot.damaged_adapters:
                await self.registry.remove_adapter(name)
                return
            record = self.registry.adapters.get(name)
            if record is None:
                self.names.look_up(name, param="name")  # raises 404 naming the nearest
                raise ApiError(404, f"{name!r} is not an adapter; GET /v1/adapters lists them.", param="name")
            has_other_name = any(r.digest == record.digest and r.name != name for r in self.registry.adapters.values())
            if (users := self.registry.pinning_profiles(record.digest)) and not has_other_name:
                message = f"Adapter {name!r} is used by {', '.join(users[:5])}; delete these profiles first."
                raise ApiError(409, message, param="name")
            self.orphans.add(record.digest)
            await self.registry.remove_adapter(name)
        self._forget(record.digest)
        await self._delete_unneeded()

    def _forget(self, digest: str) -> None:
        """Unload the stacks of an adapter, unless a record names it."""
        if not self.registry.is_needed(digest):
            self.pool.forget(digest)

    @asynccontextmanager
    async def _write(self) -> AsyncIterator[None]:
        """Alone, and with the registry knowing what its database holds."""
        async with enter(self.write_lock, self.settings.wait_timeout_s, "other changes of the registry"):
            await self.registry.settle()
            await self._delete_unneeded()
            yield

    async def _delete_unneeded(self) -> None:
        """Delete the files of adapters that turned out to have no record."""
        if self.registry.is_current:
            digests = list(self.orphans)
            self.orphans.clear()
            await self.files.delete_unneeded(digests)

    def _check_new(self, name: str) -> None:
        """Raise 409 unless `name` is free, or that of a damaged record, and one more adapter fits."""
        is_damaged = name in self.registry.snapshot.damaged_adapters
        if (owner := self.names.owner(name)) is not None and not is_damaged:
            raise ApiError(409, f"{name!r} is already {owner}; choose another name.", param="name")
        if len(self.registry.adapters) >= self.settings.max_names:
            raise ApiError(409, f"There are already {self.settings.max_names} adapters, the limit; delete one first.")

    def _check_served(self, adapter: LoraAdapter) -> None:
        """Raise unless this server can serve `adapter`."""
        check_fits(adapter, self.shapes, {self.settings.base_name, *self.settings.base_aliases})
        if adapter.rank > (limit := self.settings.max_lora_rank):
            raise ApiError(
                400, f"The adapter's rank {adapter.rank} is over FUSION_MAX_LORA_RANK={limit}; raise that setting."
            )

    async def _prove_effect(self, record: AdapterRecord, client: str | None) -> AdapterRecord:
        """`record` with its fusion's digest and its effect; AdapterError when it has none."""
        fusion = self.names.bind(parse(record.name), [record])
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                effect = await self._measure_effect(fusion, client)
        except TimeoutError:
            message = f"The adapter could not be probed within {PROBE_TIMEOUT_S:g} s; try again."
            raise ApiError(503, message) from None
        info: Mapping[str, Any] = {"fusion_digest": fusion.digest, "effect": effect}
        return AdapterRecord(record.name, record.digest, {**record.info, **info}, record.created)

    async def _measure_effect(self, fusion: Fusion, client: str | None) -> float:
        """Largest log-probability change on a probe prompt; refuses adapters without effect."""
        async with self.pool.lease(fusion, client=client) as lease:
            request = mix_request(lease.resident.request, lease.resident.key, lease.spans)
            # One after the other: without the seam, vLLM's CPU kernels let an adapter act on base
            # requests of the same batch.
            try:
                base, adapted, base_again = [await self.engine.probe(PROMPT, lora) for lora in (None, request, None)]
            except AnswerOverflowError as error:
                raise AdapterError("overflow", _OVERFLOW) from error
        if not is_finite(adapted):
            raise AdapterError("overflow", _OVERFLOW)
        noise, effect = distance(base, base_again), distance(base, adapted)
        if not effect > EFFECT_OVER_NOISE * noise:  # also for NaN
            raise AdapterError(
                "no_effect",
                f"the adapter has no effect: probe log-probabilities moved by {effect:.1e}, two runs of "
                f"the base differ by {noise:.1e}; check that it was trained, and saved after training",
            )
        return effect


def _describe(name: str, adapter: LoraAdapter, norm: float) -> AdapterRecord:
    info = {
        "rank": adapter.rank,
        "modules": len(adapter.modules),
        "bytes": adapter.nbytes,
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "norm": norm,
    }
    return AdapterRecord(name, adapter.digest, info, now())
