"""From settings to a running service: data folder, registry, engine, proof, what ships; all undone at the end."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

from adapters import AdapterError, Store
from adapters.files import adapter_path
from service.base_model import Shapes, read_dense_shapes
from service.catalog import Catalog
from service.data_folder import hold_data_folder, scratch_folder
from service.engine.flags import EngineOptions
from service.engine.proof import Proof, prove
from service.engine.server import Engine, start_engine
from service.errors import ApiError, api_error
from service.fusion_service import FusionService
from service.groups import declared_groups, warn_of_idle_groups
from service.materializer import Materializer
from service.metrics import Metrics
from service.placement import Limits
from service.pool import Pool
from service.profiles import Profiles
from service.registry import Registry
from service.residency import Residency
from service.resolve import Names
from service.settings import Settings

log = logging.getLogger("fusion")


@asynccontextmanager
async def open_service(settings: Settings) -> AsyncIterator[FusionService]:
    """A service with its engine running, mixing proven (or off) and what ships registered; stopped at the end.

    Raises RuntimeError when the data folder is another server's, mixing is required and not proven, or what the
    settings name cannot be registered; FileNotFoundError without a base; ValueError for flags vLLM does not take.
    """
    async with AsyncExitStack() as stack:
        stack.enter_context(hold_data_folder(settings.data))
        _check_base(settings.base)
        registry = Registry(settings.database or f"sqlite:///{(settings.data / 'registry.sqlite').resolve()}")
        stack.callback(registry.close)
        shapes_task = asyncio.create_task(asyncio.to_thread(read_dense_shapes, settings.base))
        stack.callback(shapes_task.cancel)
        engine = await start_engine(_engine_options(settings))
        stack.push_async_callback(engine.close)
        shapes = await shapes_task
        proof = await _prove(settings, engine, shapes)
        service = _assemble(settings, registry, engine, shapes, proof)
        await _register_shipped(service)
        await _warm(service)
        warn_of_idle_groups(settings, registry)
        await stack.enter_async_context(engine.app.router.lifespan_context(engine.app))
        yield service


def _check_base(base: str) -> None:
    if not Path(base, "config.json").is_file() and base.startswith((".", "/")):
        raise FileNotFoundError(
            f"no base model in FUSION_BASE={base!r}: `lora-fusion serve` makes the default one, "
            f"and so does `python -m training.base {base}`"
        )


def _engine_options(settings: Settings) -> EngineOptions:
    return EngineOptions(
        model=settings.base,
        served_name=settings.base_name,
        max_lora_rank=settings.max_lora_rank,
        max_loras=settings.max_loras,
        max_cpu_loras=settings.max_cpu_loras,
        mixing=settings.mixed != "off",
        extra=settings.engine_args,
    )


async def _prove(settings: Settings, engine: Engine, shapes: Shapes) -> Proof:
    """Check that this engine mixes correctly; RuntimeError when mixing is required and not proven."""
    if settings.mixed == "off":
        proof = Proof(False, "switched off by FUSION_MIXED=off", 0.0, 0.0)
    else:
        async with scratch_folder(settings.data, "proof") as folder:
            try:
                proof = await prove(engine, shapes, folder)
            except Exception as error:  # whatever the reason: without the proof nothing is mixed
                log.exception("the proof of mixing failed")
                proof = Proof(False, f"the proof could not run: {error}", 0.0, 0.0)
    if settings.mixed == "required" and not proof.proven:
        raise RuntimeError(f"FUSION_MIXED=required, but mixing is not proven: {proof.reason}")
    log.info("mixing %s: %s", "proven" if proof.proven else "OFF", proof.reason)
    return proof


def _assemble(settings: Settings, registry: Registry, engine: Engine, shapes: Shapes, proof: Proof) -> FusionService:
    metrics, writing = Metrics(), asyncio.Lock()
    names = Names(settings.base_name, registry, max_weight=settings.max_weight)
    materializer = Materializer(Store(settings.data / "adapters", budget_bytes=2**63 - 1), settings.max_lora_rank)
    builds = Store(settings.data / "builds", budget_bytes=settings.store_bytes)
    pool = Pool(
        Residency(engine, builds, metrics, capacity=settings.max_cpu_loras),
        materializer,
        Limits(proof.proven, settings.max_lora_rank),
        partial(declared_groups, settings, registry),
    )
    catalog = Catalog(settings, registry, names, materializer, pool, engine, shapes, writing)
    profiles = Profiles(settings, registry, names, pool, metrics, writing)
    return FusionService(settings, engine, proof, registry, names, metrics, pool, catalog, profiles, materializer)


async def _register_shipped(service: FusionService) -> None:
    """Register the adapters and profiles that the settings name, where their names are free."""
    for pair in service.settings.adapters:
        name, _, path = pair.partition("=")
        if service.names.owner(name) is None:
            try:
                await service.catalog.add(name, adapter_path(path))
            except (AdapterError, ApiError, OSError) as error:
                raise RuntimeError(f"FUSION_ADAPTERS names {pair!r}: {error}") from error
    for pair in service.settings.profiles:
        name, _, recipe = pair.partition("=")
        if service.names.owner(name) is not None:
            continue
        try:
            await service.profiles.put(name, recipe)
        except Exception as error:
            if api_error(error).status != 404:
                raise RuntimeError(f"FUSION_PROFILES names {pair!r}: {error}") from error
            log.warning("profile %r waits for its adapters: %s", name, error)


async def _warm(service: FusionService) -> None:
    """Load the stacks of the first profiles, so that their first requests find them."""
    for profile in list(service.registry.profiles.values())[: service.settings.max_loras]:
        try:
            async with service.pool.lease(service.names.resolve_profile(profile)):
                pass
        except Exception as error:
            log.warning("profile %r cannot be served now: %s", profile.name, error)
