"""What a server does as one of several replicas: share files, follow the others' changes, clear what nobody needs."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from adapters import Store
from service.build_files import BuildFiles
from service.errors import ApiError
from service.fusion_service import FusionService
from service.leases import Leases
from service.registry import Registry
from service.remote_stores import BUCKET, UNLIMITED, open_bucket, open_shared_store
from service.settings import Settings
from service.shared_store import MAX_COLLECTED, SharedStore, claim_folder
from service.snapshot import Snapshot
from service.threads import Threads
from service.waits import enter

COLLECT_S = 900.0
"""How often each replica looks for files in the shared place that nothing needs."""
log = logging.getLogger("fusion")


def claim_store(settings: Settings, identity: str) -> None:
    """Make FUSION_STORE the place of the registry `identity`; blocks.

    RuntimeError when it is another's or cannot be used.
    """
    if BUCKET in settings.store:
        open_bucket(settings).claim(identity)
    elif settings.store:
        claim_folder(settings.store, identity)


def open_stores(settings: Settings, registry: Registry, threads: Threads) -> tuple[Store, BuildFiles]:
    """The stores of adapters and of stacks and builds."""
    data = settings.data
    if not registry.shared:
        own = Store(data / "adapters", budget_bytes=UNLIMITED)
        return own, BuildFiles(Store(data / "builds", budget_bytes=settings.store_bytes), threads)
    adapters, made = (
        open_shared_store(settings, data, "adapters"),
        open_shared_store(settings, data, "builds", budget_bytes=settings.store_bytes),
    )
    assert adapters is not None
    assert made is not None  # replicas have a shared place
    return adapters, BuildFiles(made, threads, Leases(registry))


@contextmanager
def follow(service: FusionService) -> Iterator[None]:
    """Let go of what other replicas remove from the registry, and keep the shared place clear, for the block."""
    tasks: set[asyncio.Task[None]] = set()

    def let_go(before: Snapshot, after: Snapshot) -> None:
        for profile in before.profiles.keys() - after.profiles.keys():
            service.metrics.forget(profile)
        gone = set() if after.may_hide_adapters else before.needed - after.needed
        for digest in gone:
            service.pool.forget(digest)
        if gone:
            task = asyncio.create_task(service.files.delete_unneeded(gone))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    service.registry.on_change = let_go
    collector = asyncio.create_task(_collect(service)) if service.registry.shared else None
    try:
        yield
    finally:
        service.registry.on_change = lambda before, after: None
        if collector is not None:
            collector.cancel()


async def share(service: FusionService) -> None:
    """Publish the files of all registered adapters that are here and not yet in the shared place."""
    for digest in service.registry.snapshot.needed:
        await service.threads.adapters.run(service.materializer.sources.publish, digest)


async def _collect(service: FusionService) -> None:
    store, wait_s, run = service.materializer.sources, service.settings.wait_timeout_s, service.threads.adapters.run
    assert isinstance(store, SharedStore)
    while True:
        await asyncio.sleep(COLLECT_S)
        try:
            if not (idle := await run(store.tend, service.registry.is_needed)):
                continue
            # In turn, so that no replica registers an adapter while its files go.
            async with enter(service.catalog.write_lock, wait_s, "other changes"), service.registry.change():
                unneeded = [key for key in idle if not service.registry.is_needed(key)]
                await run(store.withdraw, unneeded[:MAX_COLLECTED])
        except (ApiError, OSError) as error:
            log.warning("the shared store was not cleared: %s", error)
