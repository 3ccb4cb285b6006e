"""Register adapters from folders once they prove to have an effect, and remove them."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack
from weakref import WeakValueDictionary

from adapters import LoraAdapter, Recipe, check_name, load
from service.adapter_files import AdapterFiles
from service.adapter_roots import find_folder
from service.base_model import read_fitting
from service.conditions import UNCONDITIONAL, Condition
from service.effect import Effects
from service.errors import ApiError, public_entry
from service.layers import BaseLayers
from service.pool import Pool
from service.records import WEIGHT_HIGH, WEIGHT_LOW, AdapterRecord, now
from service.registry import Registry
from service.resolve import Names
from service.settings import BaseMatch, Settings
from service.tenants import join_key
from service.waits import enter, finish

MISMATCH = "base_mismatch"
"""What a record holds when its adapter names another base: that name."""
MAX_NOTES = 16
MAX_ADDING = 2
"""Adapters that are read and stored at once."""
PROBE_TIMEOUT_S = 300.0
"""How long an adapter's place and its probes may take; a busy engine takes seconds."""


class Options(TypedDict, total=False):
    """How an adapter is registered: see `Catalog.add_read`."""

    tenant: str
    client: str | None
    replace: bool
    base_match: BaseMatch | None
    answer_only: bool | None
    condition: Condition


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
        """See `adapter_roots.find_folder`."""
        return find_folder(text, self.settings.adapter_roots)

    async def add(
        self,
        name: str,
        path: Path,
        **options: Unpack[Options],
    ) -> tuple[AdapterRecord, bool]:
        """Register the adapter folder at `path` as the `tenant`'s, or a public one; returns the record and whether the
        name is new.

        The files are copied into the store, so the source may go; the probe takes a place of `client`. With `replace`
        an adapter of that name makes way once the new one is ready, and the new one may have no effect, as before the
        first step of a training; requests in progress and profiles keep the old one. Raises `ApiError` 409 when the
        name is taken, 412 when the `condition` does not hold of the adapter that has it, 503 when no place becomes free
        in time, `AdapterError` when the folder does not hold an adapter of this base, or one that overflows the served
        dtype or has no effect.
        """
        return await self.add_read(name, partial(load, path), **options)

    async def add_read(
        self,
        name: str,
        read: Callable[[], LoraAdapter],
        *,
        tenant: str = "",
        client: str | None = None,
        replace: bool = False,
        base_match: BaseMatch | None = None,
        answer_only: bool | None = None,
        condition: Condition = UNCONDITIONAL,
    ) -> tuple[AdapterRecord, bool]:
        """As `add`, of what `read` returns; it runs in a thread, once more when the disk was full. `base_match` goes
        before the setting, `answer_only` before what the adapter says.
        """
        check_name(name)
        await self.registry.settle()  # nothing is read and stored for a database that does not answer
        key = join_key(tenant, name)
        condition.check(self.registry.tag_adapter(key))
        timeout_s = self.settings.wait_timeout_s
        async with AsyncExitStack() as holds:
            own = self.client_locks.setdefault(client or "", asyncio.Lock())
            async with (
                enter(own, timeout_s, "other registrations of this client"),
                enter(self.add_slots, timeout_s, "other registrations"),  # tensors of few at once in memory
            ):
                read_all = partial(read_fitting, read, self.layers, self.settings, base_match, answer_only)
                adapter, mismatch = await self.files.read(read_all)
                known = self.registry.adapters.get(key)
                is_known = known is not None and known.digest == adapter.digest
                condition.check(self.registry.tag_adapter(key))  # again: 412, not 409, for who has come too late
                if not is_known:
                    self.check_new(name, tenant=tenant, replace=replace)
                self._check_rank(adapter)
                norm = await self.files.measure(adapter, max_weight=self.settings.max_weight)
                await holds.enter_async_context(self.files.hold([adapter.digest]))
                await self.files.add(adapter)  # a known one too: damaged files are mended
                if known is not None and is_known:
                    extra = {} if mismatch is None else {MISMATCH: mismatch}
                    return dataclasses.replace(known, info={**known.info, **extra}), False
                record = _describe(tenant, name, adapter, norm, mismatch, self.layers.list_built(adapter))
                del adapter
            try:
                proved = await self._prove_effect(record, client, required=not replace)
                return await finish(self._register(proved, condition, replace=replace))
            except BaseException:
                if not self.registry.is_current:
                    self.orphans.add(record.digest)
                self._forget(record.digest)
                raise

    async def _register(
        self, record: AdapterRecord, condition: Condition, *, replace: bool
    ) -> tuple[AdapterRecord, bool]:
        async with self.files.hold([record.digest]):
            async with self._write():
                condition.check(self.registry.tag_adapter(record.key))
                known = self.registry.adapters.get(record.key)
                if known is not None and known.digest == record.digest:
                    return known, False
                self.check_new(record.name, tenant=record.tenant, replace=replace)
                if known is not None:
                    self.orphans.add(known.digest)
                await self.files.publish(record.digest)  # nobody clears it away until the record is there
                await self.registry.add_adapter(record)
            if known is None:
                return record, True
            self._forget(known.digest)
            await self._delete_unneeded()
            return record, False

    async def remove(
        self, name: str, *, tenant: str = "", even_pinned: bool = False, condition: Condition = UNCONDITIONAL
    ) -> None:
        """Remove an adapter's name, and its files when no other name and no profile needs them.

        409 while a profile names the adapter and the tenant has no other name for it, unless `even_pinned`: the profile
        keeps the content, and what its record says. 403 for a public one of which `tenant` is not the owner, 412 when
        the `condition` does not hold. Running requests finish first.
        """
        await finish(self._remove(tenant, name, condition, even_pinned=even_pinned))

    async def _remove(self, tenant: str, name: str, condition: Condition, *, even_pinned: bool) -> None:
        async with self._write():
            key, snapshot = join_key(tenant, name), self.registry.snapshot
            record = snapshot.adapters.get(key)
            if record is None and key not in snapshot.damaged_adapters:
                raise self._no_adapter(tenant, name)
            condition.check(self.registry.tag_adapter(key))
            if record is None:
                await self.registry.remove_adapter(key)
                return
            users = [] if even_pinned else snapshot.list_users(record)
            if users and snapshot.is_last(record, within=tenant):
                named = ", ".join(user.removeprefix(join_key(tenant, "")) for user in users[:5])
                message = f"Adapter {name!r} is used by {named}; delete these profiles first."
                raise ApiError(409, message, param="name")
            self.orphans.add(record.digest)
            await self.registry.remove_adapter(key)
        self._forget(record.digest)
        await self._delete_unneeded()

    def _no_adapter(self, tenant: str, name: str) -> ApiError:
        names = self.names.view(tenant)
        if (owner := names.owner(name)) is None:
            return names.not_found("adapter", name, names.seen.adapters, "name")
        if name in names.seen.adapters or name in names.seen.damaged_adapters:
            return public_entry(name, owner)
        return ApiError(404, f"{name!r} is not an adapter but {owner}; GET /v1/adapters lists adapters.", param="name")

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

    def check_new(self, name: str, *, tenant: str = "", replace: bool) -> None:
        """Raise 409 unless `name` is free, that of a damaged record, or with `replace` an adapter's, and there is room
        for what is added, or kept for profiles; 403 for what is public and not `tenant`'s.
        """
        snapshot, key, names = self.registry.snapshot, join_key(tenant, name), self.names.view(tenant)
        is_adapter, is_damaged = key in snapshot.adapters, key in snapshot.damaged_adapters
        if (owner := names.owner(name)) is not None and not (is_damaged or (is_adapter and replace)):
            if replace and names.seen.is_public(name):
                raise public_entry(name, owner)
            way = ", or pass 'replace': true" if is_adapter else ""
            raise ApiError(409, f"{name!r} is already {owner}; choose another name{way}.", param="name")
        if is_adapter and snapshot.will_keep(key) is None:
            return
        if len(snapshot.adapters) + len(snapshot.nameless) >= self.settings.max_names:
            kept = len(snapshot.nameless) if not tenant else 0
            others = f" ({kept} without a name, for profiles)" if kept else ""
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
        return dataclasses.replace(record, info={**record.info, **info})


def _describe(
    tenant: str, name: str, adapter: LoraAdapter, norm: float, mismatch: str | None, built: str
) -> AdapterRecord:
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
    if adapter.weight_range is not None:
        info[WEIGHT_LOW], info[WEIGHT_HIGH] = adapter.weight_range
    if mismatch is not None:
        info[MISMATCH] = mismatch
    if adapter.notes:  # one text, which servers of earlier versions can read
        info["notes"] = "\n".join(adapter.notes[:MAX_NOTES])
    return AdapterRecord(name, adapter.digest, info, now(), tenant)
