"""Fetches in the background: one for a name, one download for a source, few at once, and on after a kill."""

import asyncio
import hashlib
import json
import logging
import os
import secrets
import shutil
from contextvars import copy_context
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from adapters import check_name
from service.audit import Actor, current_actor
from service.catalog import Catalog
from service.client_turns import ClientTurns
from service.conditions import Condition
from service.edge.clients import Shares
from service.errors import ApiError, api_error, hide_paths
from service.records import AdapterRecord
from service.settings import BaseMatch
from service.sources.fetch import Sources, read_fetched
from service.sources.locations import Location, parse_location
from service.sources.loop_thread import LoopThread
from service.sources.transfer import Progress
from service.tenants import join_key
from service.validation import MAX_QUOTED

State = Literal["queued", "fetching", "registering", "failed"]
MAX_FETCHES = 256
"""Queued and in progress; one client may have three quarters of them."""
MAX_FAILURES = 256
"""Failures that are remembered."""
QUEUE_S = 3600.0
CLOSE_S = 5.0
FOLDER = "fetches"
log = logging.getLogger("fusion")


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be fetched and registered, as in `POST /v1/adapters`."""

    name: str
    source: str
    client: str | None = None
    replace: bool = False
    base_match: BaseMatch | None = None
    answer_only: bool | None = None
    tenant: str = ""
    if_match: str | None = None
    if_none_match: str | None = None

    @property
    def key(self) -> str:
        """The registered name that the adapter is to have."""
        return join_key(self.tenant, self.name)

    @property
    def condition(self) -> Condition:
        """What must hold of the adapter that has the name."""
        return Condition(self.if_match, self.if_none_match)


@dataclass(slots=True)
class Download:
    """One source's content on its way, for all of one tenant who want it: what others fetch can be seen in no state,
    and keeps nobody waiting.
    """

    key: str
    location: Location
    folder: Path
    task: asyncio.Task[None] | None = None
    users: int = 0
    runs: bool = False
    progress: Progress = field(default_factory=Progress)


@dataclass(slots=True)
class Fetch:
    """One name's fetch."""

    order: Order
    download: Download
    task: asyncio.Task[tuple[AdapterRecord, bool]] | None = None
    registers: bool = False
    reason: str = ""
    """Why it failed."""

    @property
    def state(self) -> State:
        """How far it is."""
        if self.reason:
            return "failed"
        if self.registers:
            return "registering"
        return "fetching" if self.download.runs else "queued"

    async def wait(self) -> tuple[AdapterRecord, bool]:
        """The record and whether its name is new, once there is one; it goes on when the caller is canceled."""
        assert self.task is not None
        await asyncio.wait([self.task])
        if self.task.cancelled():
            raise ApiError(409, f"The fetch of {self.order.name!r} was ended by a DELETE, or a stop.", param="name")
        return self.task.result()


class Fetches:
    """All fetches of a server. What is not ended is in the data folder, and goes on at the next start."""

    def __init__(self, sources: Sources, catalog: Catalog, *, max_fetches: int) -> None:
        self._sources = sources
        self._catalog = catalog
        self._folder = catalog.settings.data / FOLDER
        self._turns = ClientTurns("other fetches", QUEUE_S, max_fetches)
        self._shares = Shares(MAX_FETCHES)
        self._fetches: dict[str, Fetch] = {}
        self._downloads: dict[str, Download] = {}
        self._cleaning: set[asyncio.Task[None]] = set()
        self._loop = LoopThread()
        self._closing = False

    def get(self, name: str, tenant: str = "") -> Fetch | None:
        """The tenant's fetch of `name` that is in progress, or failed."""
        return self._fetches.get(join_key(tenant, name))

    def names(self, tenant: str = "") -> list[str]:
        """All of the tenant's that `get` knows."""
        return [fetch.order.name for fetch in self._fetches.values() if fetch.order.tenant == tenant]

    def start(self, order: Order, folder: str = "") -> Fetch:
        """Begin a fetch, or join the one that is in progress for the same order.

        `ApiError` 403 for a source that is not allowed, 409 for a name that is taken or being fetched otherwise, 429
        when there are too many. `folder` has what an earlier server fetched.
        """
        location = parse_location(order.source)
        self._sources.allowed.check(location)
        check_name(order.name)
        known = self._fetches.get(order.key)
        if known is not None and not known.reason:
            if asdict(known.order) | {"client": None} == asdict(order) | {"client": None}:
                return known
            message = f"{order.name!r} is being fetched from {known.download.location.text[:MAX_QUOTED]!r}; wait for it"
            raise ApiError(409, f"{message}, or delete it.", param="name")
        order.condition.check(self._catalog.registry.tag_adapter(order.key))
        if order.key not in self._catalog.registry.adapters:
            self._catalog.check_new(order.name, tenant=order.tenant, replace=order.replace)
        if order.client is not None and not self._shares.take(order.client):
            message = "Too many fetches are queued, or most are from this client; try again."
            raise ApiError(429, message)
        fetch = Fetch(order, self._enter(order, location, folder or secrets.token_hex(16)))
        try:
            self._write(fetch)
        except BaseException:  # such as a full disk: the fetch never starts, so its share is free again
            self._give_back(fetch)
            raise
        self._fetches.pop(order.key, None)  # a new one is the last of all
        self._fetches[order.key] = fetch
        fetch.task = asyncio.create_task(self._run(fetch))
        fetch.task.add_done_callback(partial(self._end, fetch))
        return fetch

    async def cancel(self, name: str, tenant: str = "") -> bool:
        """End the tenant's fetch of `name`, or forget that it failed; whether there was one."""
        fetch = self._fetches.pop(join_key(tenant, name), None)
        if fetch is None:
            return False
        self._file(fetch.order.key).unlink(missing_ok=True)
        if fetch.task is not None and not fetch.task.done():
            fetch.task.cancel()
            await asyncio.wait([fetch.task])
        return True

    def resume(self) -> None:
        """Go on with the fetches that the last server did not end, and delete what belongs to none."""
        orders = []
        for file in sorted(self._folder.glob("*.json")):
            try:
                content = json.loads(file.read_text())
                actor = Actor(**content.get("actor", {}))
                orders.append((file, Order(**content["order"]), str(content["folder"]), actor))
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                log.warning("a fetch cannot go on, %s is not readable: %s", file.name, type(error).__name__)
                file.unlink(missing_ok=True)
        for file, order, known, actor in orders:
            context = copy_context()  # which the fetch's task has: the audit says who asked for it
            context.run(current_actor.set, actor)
            try:
                context.run(self.start, order, known)
            except Exception as error:  # no longer allowed, or the name is taken
                log.warning("the fetch of adapter %r does not go on: %s", order.name, error)
                file.unlink(missing_ok=True)
        kept = {download.folder for download in self._downloads.values()}
        for folder in self._folder.glob("*/"):
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    async def close(self) -> None:
        """Stop all fetches; they go on at the next start."""
        self._closing = True
        tasks = [fetch.task for fetch in self._fetches.values() if fetch.task is not None and not fetch.task.done()]
        for task in tasks:
            task.cancel()
        if ending := [*tasks, *self._cleaning]:
            await asyncio.wait(ending, timeout=CLOSE_S)
        await self._loop.close()

    def _enter(self, order: Order, location: Location, folder: str) -> Download:
        """The download from `location`, perhaps begun already for the same tenant, with one user more."""
        key = join_key(order.tenant, location.text)
        download = self._downloads.setdefault(key, Download(key, location, self._folder / folder))
        download.users += 1
        return download

    async def _run(self, fetch: Fetch) -> tuple[AdapterRecord, bool]:
        order, download = fetch.order, fetch.download
        try:
            if download.task is None:
                download.task = asyncio.create_task(self._download(download, order.client))
            await asyncio.shield(download.task)
            self._catalog.registry.check_actor()  # before anything is stored, or given a place
            fetch.registers = True
            pin = parse_location(order.source).pin
            return await self._catalog.add_read(
                order.name,
                partial(read_fetched, download.folder, pin, self._catalog.settings.data),
                tenant=order.tenant,
                client=order.client,
                replace=order.replace,
                base_match=order.base_match,
                answer_only=order.answer_only,
                condition=order.condition,
            )
        except Exception as error:
            failure = api_error(error)
            if failure.status == 500:
                log.exception("the fetch of adapter %r failed", order.key)
            fetch.reason = hide_paths(failure.message)
            raise ApiError(failure.status, fetch.reason, param="source") from error

    async def _download(self, download: Download, client: str | None) -> None:
        async with self._turns.hold(client):
            download.runs = True
            await self._loop.run(self._sources.fetch(download.location, download.folder, download.progress))

    def _end(self, fetch: Fetch, task: asyncio.Task[Any]) -> None:
        """Give back what a fetch used. One that succeeded is forgotten, of those that failed a few are remembered."""
        self._give_back(fetch)
        if not task.cancelled():
            task.exception()  # asyncio would log it when nobody waits
        if self._fetches.get(fetch.order.key) is not fetch or self._closing:
            return
        self._file(fetch.order.key).unlink(missing_ok=True)
        if not fetch.reason:
            del self._fetches[fetch.order.key]
        failed = [name for name, other in self._fetches.items() if other.reason]
        for name in failed[:-MAX_FAILURES]:
            del self._fetches[name]

    def _give_back(self, fetch: Fetch) -> None:
        """Let go of its client's share and of its download."""
        if fetch.order.client is not None:
            self._shares.free(fetch.order.client)
        self._leave(fetch.download)

    def _leave(self, download: Download) -> None:
        """One user less; without any, what it fetched is deleted, or waits for the next start if the server stops."""
        download.users -= 1
        if not download.users:
            del self._downloads[download.key]
            if download.task is not None:
                download.task.cancel()
            if not self._closing:
                cleaning = asyncio.create_task(self._clean(download))
                self._cleaning.add(cleaning)
                cleaning.add_done_callback(self._cleaning.discard)

    async def _clean(self, download: Download) -> None:
        if download.task is not None:
            await asyncio.wait([download.task])
        await asyncio.to_thread(shutil.rmtree, download.folder, ignore_errors=True)

    def _file(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def _write(self, fetch: Fetch) -> None:
        self._folder.mkdir(exist_ok=True)
        file = self._file(fetch.order.key)
        scratch = file.with_suffix(".new")
        content = {"folder": fetch.download.folder.name, "order": asdict(fetch.order)}
        scratch.write_text(json.dumps(content | {"actor": asdict(current_actor.get())}))
        os.replace(scratch, file)
