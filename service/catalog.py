"""Register adapters from folders once they prove to have an effect, and remove them."""

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from adapters import LoraAdapter, Recipe, check_name, load
from adapters.files import SHIPPED, adapter_path
from service.adapter_files import AdapterFiles
from service.base_model import read_fitting
from service.effect import Effects
from service.errors import ApiError
from service.layers import BaseLayers
from service.pool import Pool
from service.records import AdapterRecord, now
from service.registry import Registry
from service.resolve import Names
from service.settings import BaseMatch, Settings
from service.validation import MAX_QUOTED
from service.waits import enter, finish

MISMATCH = "base_mismatch"
"""What a record holds when its adapter names another base: that name."""
MAX_NOTES = 16
MAX_ADDING = 2
"""Adapters that are read and stored at once."""
PROBE_TIMEOUT_S = 300.0
"""How long an adapter's place and its probes may take; a busy engine takes seconds."""


def _not_in_roots(text: str) -> ApiError:
    message = f"{text[:MAX_QUOTED]!r} is not a folder inside FUSION_ADAPTER_ROOTS; use one there, or upload a .tar."
    return ApiError(400, message, param="path")


@dataclass(frozen=True, slots=True)
class Catalog:
    """Adds and removes adapters, one change of the registry at a time."""

    settings: Settings
    registry: Registry
    names: Names
    pool: Pool
    effects: Effects
    layers: BaseLayers
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
            if not os.access(file, os.R_OK):
                message = f"The server's user may not read {file.name!r} in {text[:MAX_QUOTED]!r}; change its mode."
                raise ApiError(400, message, param="path")
        return path

    async def add(
        self,
        name: str,
        path: Path,
        *,
        client: str | None = None,
        replace: bool = False,
        base_match: BaseMatch | None = None,
        answer_only: bool | None = None,
    ) -> tuple[AdapterRecord, bool]:
        """Register the adapter folder at `path`; returns the record and whether the name is new.

        The files are copied into the store, so the source may go; the probe takes a place of `client`. With `replace`
        an adapter of that name makes way once the new one is ready, and the new one may have no effect, as before the
        first step of a training; requests in progress and profiles keep the old one. Raises `ApiError` 409 when the
        name is taken, 503 when no place becomes free in time, `AdapterError` when the folder does not hold an adapter
        of this base, or one that overflows the served dtype or has no effect.
        """
        keys: dict[str, Any] = {"replace": replace, "base_match": base_match, "answer_only": answer_only}
        return await self.add_read(name, partial(load, path), client=client, **keys)

    async def add_read(
        self,
        name: str,
        read: Callable[[], LoraAdapter],
        *,
        client: str | None = None,
        replace: bool = False,
        base_match: BaseMatch | None = None,
        answer_only: bool | None = None,
    ) -> tuple[AdapterRecord, bool]:
        """As `add`, of what `read` returns; it runs in a thread, once more when the disk was full. `base_match` goes
        before the setting, `answer_only` before what the adapter says.
        """
        check_name(name)
        await self.registry.settle()  # nothing is read and stored for a database that does not answer
        timeout_s = self.settings.wait_timeout_s
        async with AsyncExitStack() as holds:
            own = self.client_locks.setdefault(client or "", asyncio.Lock())
            async with (
                enter(own, timeout_s, "other registrations of this client"),
                enter(self.add_slots, timeout_s, "other registrations"),  # tensors of few at once in memory
            ):
                read_all = partial(read_fitting, read, self.layers, self.settings, base_match, answer_only)
                adapter, mismatch = await self.files.read(read_all)
                known = self.registry.adapters.get(name)
                is_known = known is not None and known.digest == adapter.digest
                if not is_known:
                    self.check_new(name, replace=replace)
                self._check_rank(adapter)
                norm = await self.files.measure(adapter, max_weight=self.settings.max_weight)
                await holds.enter_async_context(self.files.hold([adapter.digest]))
                await self.files.add(adapter)  # a known one too: damaged files are mended
                if known is not None and is_known:
                    extra = {} if mismatch is None else {MISMATCH: mismatch}
                    return dataclasses.replace(known, info={**known.info, **extra}), False
                record = _describe(name, adapter, norm, mismatch, self.layers.list_built(adapter))
                del adapter
            try:
                proved = await self._prove_effect(record, client, required=not replace)
                return await finish(self._register(proved, replace=replace))
            except BaseException:
                if not self.registry.is_current:
                    self.orphans.add(record.digest)
                self._forget(record.digest)
                raise

    async def _register(self, record: AdapterRecord, *, replace: bool) -> tuple[AdapterRecord, bool]:
        async with self.files.hold([record.digest]):
            async with self._write():
                known = self.registry.adapters.get(record.name)
                if known is not None and known.digest == record.digest:
                    return known, False
                self.check_new(record.name, replace=replace)
                if known is not None:
                    self.orphans.add(known.digest)
                await self.files.publish(record.digest)  # nobody clears it away until the record is there
                await self.registry.add_adapter(record)
            if known is None:
                return record, True
            self._forget(known.digest)
            await self._delete_unneeded()
            return record, False

    async def remove(self, name: str, *, even_pinned: bool = False) -> None:
        """Remove an adapter's name, and its files when no other name and no profile needs them.

        409 while a profile names the adapter and it has no other name, unless `even_pinned`: the profile keeps the
        content, and what its record says. Running requests finish first.
        """
        await finish(self._remove(name, even_pinned=even_pinned))

    async def _remove(self, name: str, *, even_pinned: bool) -> None:
        async with self._write():
            if name in self.registry.snapshot.damaged_adapters:
                await self.registry.remove_adapter(name)
                return
            record = self.registry.adapters.get(name)
            if record is None:
                if (owner := self.names.owner(name)) is None:
                    raise self.names.not_found("adapter", name, self.registry.adapters, "name")
                message = f"{name!r} is not an adapter but {owner}; GET /v1/adapters lists adapters."
                raise ApiError(404, message, param="name")
            users = [] if even_pinned else self.registry.profiles_that_name(name)
            if users and self.registry.snapshot.is_last(record):
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
        wait_s = self.settings.wait_timeout_s
        async with enter(self.write_lock, wait_s, "other changes of the registry"), self.registry.change():
            await self._delete_unneeded()
            yield

    async def _delete_unneeded(self) -> None:
        """Delete the files of adapters that turned out to have no record."""
        if self.registry.is_current:
            digests = list(self.orphans)
            self.orphans.clear()
            await self.files.delete_unneeded(digests)

    def check_new(self, name: str, *, replace: bool) -> None:
        """Raise 409 unless `name` is free, that of a damaged record, or with `replace` an adapter's, and there is room
        for what is added, or kept for profiles.
        """
        snapshot = self.registry.snapshot
        is_adapter, is_damaged = name in snapshot.adapters, name in snapshot.damaged_adapters
        if (owner := self.names.owner(name)) is not None and not (is_damaged or (is_adapter and replace)):
            way = ", or pass 'replace': true" if is_adapter else ""
            raise ApiError(409, f"{name!r} is already {owner}; choose another name{way}.", param="name")
        if is_adapter and snapshot.will_keep(name) is None:
            return
        if len(snapshot.adapters) + len(snapshot.nameless) >= self.settings.max_names:
            others = f" ({len(snapshot.nameless)} without a name, for profiles)" if snapshot.nameless else ""
            message = f"There are already {self.settings.max_names} adapters{others}, the limit; delete one first."
            raise ApiError(409, message)

    def _check_rank(self, adapter: LoraAdapter) -> None:
        if adapter.rank > (limit := self.settings.max_lora_rank):
            raise ApiError(
                400, f"The adapter's rank {adapter.rank} is over FUSION_MAX_LORA_RANK={limit}; raise that setting."
            )

    async def _prove_effect(self, record: AdapterRecord, client: str | None, *, required: bool) -> AdapterRecord:
        """`record` with its fusion's digest and its effect; AdapterError when it has none and it is `required`."""
        fusion = self.names.bind(Recipe.single(record.name), [record])  # everywhere: a probe needs no positions
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                if "gate" in record.info and not self.pool.limits.mixing:
                    effect = 0.0  # a gate is never built, and recipes with one are refused on this server
                else:
                    effect = await self.effects.measure(fusion, client, required=required)
        except TimeoutError:
            message = f"The adapter could not be probed within {PROBE_TIMEOUT_S:g} s; try again."
            raise ApiError(503, message) from None
        digest = self.names.bind(record.recipe, [record]).digest
        info: Mapping[str, Any] = {"fusion_digest": digest, "effect": effect}
        return AdapterRecord(record.name, record.digest, {**record.info, **info}, record.created)


def _describe(name: str, adapter: LoraAdapter, norm: float, mismatch: str | None, built: str) -> AdapterRecord:
    info: dict[str, Any] = {
        "rank": adapter.rank,
        "modules": len(adapter.modules),
        "bytes": adapter.nbytes,
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "norm": norm,
    }
    if built:
        info["built"] = built
    if adapter.gate is not None:
        info["gate"] = adapter.gate.to_text()
    if adapter.answer_only:
        info["answer_only"] = True
    if mismatch is not None:
        info[MISMATCH] = mismatch
    if adapter.notes:  # one text, which servers of earlier versions can read
        info["notes"] = "\n".join(adapter.notes[:MAX_NOTES])
    return AdapterRecord(name, adapter.digest, info, now())
