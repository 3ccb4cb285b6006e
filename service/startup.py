"""From settings to a running service: data folder, registry, engine, proof, what ships; all undone at the end."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import get_args

from adapters import Store
from service.adapter_files import AdapterFiles
from service.base_model import check_registered, read_layers
from service.build_files import BuildFiles
from service.catalog import Catalog
from service.client_turns import ClientTurns
from service.clients import ClientPlaces
from service.data_folder import hold_data_folder, scratch_folder
from service.effect import Effects
from service.engine.base_folder import check_folder, has_flag
from service.engine.flags import EngineOptions
from service.engine.proof import Proof, prove
from service.engine.server import Engine, start_engine
from service.errors import hide_paths
from service.exports import Exports
from service.functions import Functions
from service.fusion_service import FusionService
from service.groups import declared_groups, warn_of_idle_groups
from service.key_ring import KeyRing, check_keyless
from service.keys import Keys
from service.layers import BaseLayers, Shapes, refuse_unserved
from service.limits import Limits as CallerLimits, open_limits
from service.loaded import LoadedNames
from service.materializer import Materializer
from service.metrics import Metrics
from service.norms import Headroom
from service.pins import Pins
from service.placement import Kind, Limits
from service.policy import Policy
from service.policy_rules import read_rules
from service.pool import Pool
from service.processes import Processes
from service.profiles import Profiles
from service.registry import Registry
from service.replicas import claim_store, follow, open_stores, share
from service.residency import Residency
from service.resolve import Names
from service.scorecards import Scorecards
from service.settings import Settings
from service.shipped import register_shipped, warm
from service.sources.fetch import Sources
from service.sources.fetches import Fetches
from service.threads import Threads
from service.tracing import find_collector

log = logging.getLogger("fusion")

ENGINE_PATIENCE = 10
"""An engine that answers nothing for this many times FUSION_LOOP_TIMEOUT_S counts as dead. Generous, since it answers
between its steps only: on CPUs a long prefill of a large base takes many seconds.
"""
TEMPLATE_TEXT = 2
"""How much longer than the largest body the text of a chat template may be."""


@contextmanager
def open_registry(settings: Settings) -> Iterator[Registry]:
    """The registry, in a data folder held for this process; RuntimeError when another server holds it, or what
    replicas share is another registry's or cannot be used.

    FileNotFoundError without a base, `BaseModelError` for one that is not whole, before anything else is waited for.
    """
    check_folder(settings.base, settings.engine_args)
    with hold_data_folder(settings.data):
        shared, timeout_s = bool(settings.store), settings.database_timeout_s
        registry = Registry(settings.registry_url, timeout_s=timeout_s, shared=shared, folder=settings.data)
        try:
            check_keyless(settings, has_keys=registry.snapshot.has_keys)
            claim_store(settings, registry.identity)
            yield registry
        finally:
            registry.close()


@asynccontextmanager
async def open_service(settings: Settings, registry: Registry, metrics: Metrics) -> AsyncIterator[FusionService]:
    """A service with its engine running, mixing proven (or off) and what ships registered; stopped at the end.

    Raises RuntimeError when the engine dies, mixing is required and not proven, or what the settings name cannot be
    registered; ValueError for flags vLLM does not take and bases it cannot serve.
    """
    sources = Sources.open(settings)
    limits = open_limits(settings, registry, metrics)
    async with AsyncExitStack() as stack:
        trust_code = has_flag(settings.engine_args, "--trust-remote-code")
        layers_task = asyncio.create_task(asyncio.to_thread(read_layers, settings.base, trust_code=trust_code))
        stack.callback(layers_task.cancel)
        processes = Processes.start()
        stack.callback(processes.close)
        engine = await start_engine(_engine_options(settings))
        stack.push_async_callback(engine.close)
        stack.callback(setattr, metrics.loaded, "source", None)
        for watch in (engine.watch(ENGINE_PATIENCE * settings.loop_timeout_s), registry.watch(), limits.watch()):
            stack.callback(asyncio.create_task(watch).cancel)
        threads = Threads.start(waiting=settings.max_waiting, wait_timeout_s=settings.wait_timeout_s)
        stack.callback(threads.close)
        try:
            layers = refuse_unserved(await layers_task, await engine.special_layers(), engine.why_no_head)
            proof = await _prove(settings, engine, layers.dense)
            service = _assemble(settings, registry, metrics, engine, layers, proof, threads, processes, sources, limits)
            stack.push_async_callback(service.fetches.close)
            stack.callback(asyncio.create_task(service.keys.ring.record()).cancel)
            await _fill(service)
        except Exception as error:
            raise (
                error if engine.alive else RuntimeError(f"the engine died while it started: {engine.death()}")
            ) from error
        stack.enter_context(follow(service))
        check = asyncio.create_task(service.files.check(registry))
        stack.callback(check.cancel)
        await stack.enter_async_context(engine.app.router.lifespan_context(engine.app))
        gc.collect()
        gc.freeze()  # what is there stays: looking through it would hold all streams up for a moment
        yield service


async def _fill(service: FusionService) -> None:
    """Put what belongs there into a service whose engine has just started; RuntimeError when what is there is of
    another base.
    """
    records, layers, read = list(service.registry.adapters.values()), service.catalog.layers, service.materializer.open
    await service.threads.adapters.run(check_registered, records, layers, service.settings, read)
    await share(service)
    await delete_orphans(service)
    service.fetches.resume()
    await register_shipped(service)
    for warning in service.policy.list_warnings():
        log.warning("%s", warning)
    await warm(service)
    warn_of_idle_groups(service.settings, service.registry)


def _engine_options(settings: Settings) -> EngineOptions:
    return EngineOptions(
        model=settings.base,
        served_name=settings.base_name,
        max_lora_rank=settings.max_lora_rank,
        max_loras=settings.max_loras,
        max_cpu_loras=settings.max_cpu_loras,
        mixing=settings.mixed != "off",
        template_bytes=TEMPLATE_TEXT * settings.max_body_bytes if settings.client_templates else None,
        extra=(*settings.engine_args, *_trace_flags()),
        gate_timeout_s=settings.gate_timeout_s,
        slot_wait_s=settings.wait_timeout_s,
    )


def _trace_flags() -> tuple[str, ...]:
    collector = find_collector()
    return () if collector is None else ("--otlp-traces-endpoint", collector.endpoint)


async def _prove(settings: Settings, engine: Engine, shapes: Shapes) -> Proof:
    """Check that this engine mixes correctly; RuntimeError when mixing is required and not proven."""
    if settings.mixed == "off":
        proof = Proof(False, "switched off by FUSION_MIXED=off", 0.0, 0.0)
    else:
        with scratch_folder(settings.data, "proof") as folder:
            try:
                proof = await prove(engine, shapes, folder)
            except Exception as error:  # whatever the reason: without the proof nothing is mixed
                if not engine.alive:
                    raise
                log.exception("the proof of mixing failed")
                proof = Proof(False, f"the proof could not run: {hide_paths(str(error))}", 0.0, 0.0)
    if settings.mixed == "required" and not proof.proven:
        raise RuntimeError(f"FUSION_MIXED=required, but mixing is not proven: {proof.reason}")
    log.info("mixing %s: %s", "proven" if proof.proven else "OFF", proof.reason)
    return proof


def _assemble(
    settings: Settings,
    registry: Registry,
    metrics: Metrics,
    engine: Engine,
    layers: BaseLayers,
    proof: Proof,
    threads: Threads,
    processes: Processes,
    sources: Sources,
    limits: CallerLimits,
) -> FusionService:
    metrics.registry.set_function(lambda: registry.outage is None)
    write_lock, headroom = asyncio.Lock(), Headroom(engine.dtype)
    engine.overflows.counter = metrics.overflows
    names = Names(settings.base_name, registry, max_weight=settings.max_weight, max_norm=headroom.largest_norm)
    store, builds = open_stores(settings, registry, threads)
    materializer = _make_materializer(settings, registry, store, headroom, layers, processes)
    files = AdapterFiles(materializer, builds, threads, registry.is_needed, timeout_s=settings.wait_timeout_s)
    pool = _make_pool(settings, names, metrics, engine, proof, materializer, builds, files, threads)
    metrics.loaded.source = LoadedNames(names, pool, settings.model_forms, settings.max_loras).survey
    catalog = Catalog(settings, registry, names, pool, Effects(pool, engine), layers, files, write_lock)
    fetches = Fetches(sources, catalog, max_fetches=settings.max_fetches)
    policy = _read_policy(settings, registry, metrics)
    profiles = Profiles(settings, registry, names, pool, metrics, files, policy, write_lock)
    exports = Exports(settings.data, materializer, files, threads)
    pins = Pins(registry, names, pool, policy, write_lock, settings.max_cpu_loras, settings.wait_timeout_s)
    pool.keep_pinned(pins.list_keys)
    return FusionService(
        settings,
        engine,
        proof,
        registry,
        names,
        metrics,
        pool,
        catalog,
        fetches,
        profiles,
        Scorecards(settings, registry, write_lock, policy.evidence),
        policy,
        materializer,
        files,
        exports,
        threads,
        Keys(settings, registry, write_lock, KeyRing(registry, engine.api_keys)),
        limits,
        pins,
    )


def _read_policy(settings: Settings, registry: Registry, metrics: Metrics) -> Policy:
    rules, record = read_rules(settings.policy), metrics.record_rule
    policy = Policy(rules, registry, max_rank=settings.max_lora_rank, record=record)
    metrics.evidence.source = policy.list_evidence
    for rule in rules.floor:
        metrics.set_floor(rule.adapter, rule.at_least)
    return policy


def _make_materializer(
    settings: Settings,
    registry: Registry,
    store: Store,
    headroom: Headroom,
    layers: BaseLayers,
    processes: Processes,
) -> Materializer:
    compute, export = processes.fusions.run, processes.exports.run
    limits = settings.max_lora_rank, registry.describe, headroom, layers.expert_shapes
    return Materializer(store, *limits, compute, export)


def _make_pool(
    settings: Settings,
    names: Names,
    metrics: Metrics,
    engine: Engine,
    proof: Proof,
    materializer: Materializer,
    builds: BuildFiles,
    files: AdapterFiles,
    threads: Threads,
) -> Pool:
    for kind in get_args(Kind):
        metrics.set_resident(kind, 0)  # an engine that died has lost them
    residency = Residency(
        engine,
        builds,
        metrics,
        capacity=settings.max_cpu_loras,
        max_waiting=settings.max_waiting,
        wait_timeout_s=settings.wait_timeout_s,
    )
    return Pool(
        residency,
        materializer,
        Limits(proof.proven, settings.max_lora_rank, proof.tables, proof.phases, proof.limits),
        Functions(
            materializer.open,
            engine.modules,
            threads.functions.run,
            names.check_norm,
            ClientTurns("the functions of requests", settings.wait_timeout_s),
        ),
        partial(declared_groups, settings, names.registry),
        hold=files.hold,
        clients=ClientPlaces(metrics, limit=settings.client_places, max_waiting=settings.max_waiting),
        checks=ClientTurns("the checks of requests", settings.wait_timeout_s),
        slots=settings.max_loras,
    )


async def delete_orphans(service: FusionService) -> None:
    """Delete the files of adapters without a record, as a server leaves them that is killed before it adds one."""
    entries = await service.threads.files.run(service.materializer.sources.entries)
    await service.files.delete_unneeded([entry.key for entry in entries])
