"""The service itself: engine, registry, store and pool put together, and what can be done with them.

A request flows one way: route → registry → recipe → pool → store → engine.
"""

import asyncio
import fcntl
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from adapters import (
    AdapterError,
    Recipe,
    Store,
    check_name,
    fusion_digest,
    load,
    parse,
    plan,
    save,
)
from service.base_model import check_fits, dense_shapes
from service.defaults import check_defaults
from service.engine.proof import PROMPT, Proof, distance, prove
from service.engine.server import Engine, EngineOptions, start
from service.errors import ApiError, api_error
from service.gate import Gate, lora_request
from service.metrics import Metrics
from service.pool import ADAPTER, Pool
from service.registry import AdapterRecord, ProfileVersion, Registry, now
from service.resolve import Fusion, Names
from service.settings import Settings

log = logging.getLogger("fusion")

LOCK_WAIT_S = 10
"""A server that is just ending gives its data folder free within this."""
MAX_DESCRIPTION = 4096
MAX_VERSIONS = 1000
PROFILE_KEYS = {"fusion", "defaults", "description"}


TEMPORARY = ("proof", "export", "upload")


def lock(data: Path) -> IO[str]:
    """Hold `data` for this process alone, to its end; raises when another server has it."""
    handle = (data / "lock").open("w")
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() > deadline:
                handle.close()
                raise RuntimeError(
                    f"another server uses the data folder {str(data)!r}; stop it or set FUSION_DATA"
                ) from None
            time.sleep(0.2)


class FusionService:
    """One server's state. `start` first; then the routes call the rest."""

    engine: Engine
    pool: Pool
    gate: Gate
    proof: Proof

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        data = settings.data
        data.mkdir(parents=True, exist_ok=True)
        self._lock = lock(data)
        for left in (f for kind in TEMPORARY for f in data.glob(f"{kind}-*")):
            shutil.rmtree(left, ignore_errors=True)  # from a server that was killed
        url = settings.database or f"sqlite:///{(data / 'registry.sqlite').resolve()}"
        self.registry = Registry(url)
        self.sources = Store(data / "adapters", budget_bytes=2**63 - 1)
        self.builds = Store(data / "builds", budget_bytes=settings.store_bytes)
        self.metrics = Metrics()
        self.names = Names(settings.base_name, self.registry, max_weight=settings.max_weight)
        self.ready = False
        self._writing = asyncio.Lock()

    async def start(self) -> None:
        """Start the engine, prove mixing, register what ships; raises when `required` and not proven."""
        s = self.settings
        if not Path(s.base, "config.json").is_file() and s.base.startswith((".", "/")):
            raise FileNotFoundError(f"no base model in {s.base!r}: run `make setup` or set FUSION_BASE")
        loading = asyncio.to_thread(dense_shapes, s.base)
        options = EngineOptions(
            model=s.base,
            served_name=s.base_name,
            max_lora_rank=s.max_lora_rank,
            max_loras=s.max_loras,
            max_cpu_loras=s.max_cpu_loras,
            mixing=s.mixed != "off",
            extra=s.engine_args,
        )
        self.engine, self.shapes = await asyncio.gather(start(options), loading)
        self.proof = await self._prove()
        if s.mixed == "required" and not self.proof.proven:
            raise RuntimeError(f"FUSION_MIXED=required, but mixing is not proven: {self.proof.reason}")
        log.info("mixing %s: %s", "proven" if self.proof.proven else "OFF", self.proof.reason)
        self.pool = Pool(
            self.engine,
            self.builds,
            self._source,
            self.metrics,
            capacity=s.max_cpu_loras,
            max_rank=s.max_lora_rank,
            mixing=self.proof.proven,
            groups=self._groups,
        )
        self.gate = Gate(self.engine.app, self.names, self.pool, self.metrics, strict=s.strict)
        await self._register_shipped()
        self._check_groups()
        self.ready = True

    async def close(self) -> None:
        """Stop the engine and release the registry."""
        self.ready = False
        if hasattr(self, "engine"):
            await self.engine.close()
        self.registry.close()
        self._lock.close()

    async def _prove(self) -> Proof:
        if self.settings.mixed == "off":
            return Proof(False, "switched off by FUSION_MIXED=off", 0.0, 0.0)
        folder = Path(tempfile.mkdtemp(prefix="proof-", dir=self.settings.data))
        try:
            return await prove(self.engine, self.shapes, folder)
        except Exception as error:  # whatever the reason: without the proof nothing is mixed
            log.exception("the proof of mixing failed")
            return Proof(False, f"the proof could not run: {error}", 0.0, 0.0)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _register_shipped(self) -> None:
        for pair in self.settings.adapters:
            name, _, path = pair.partition("=")
            if self.names.taken(name) is None:
                try:
                    await self.add_adapter(name, Path(path))
                except (AdapterError, ApiError, OSError) as error:
                    raise RuntimeError(f"FUSION_ADAPTERS names {pair!r}: {error}") from error
        for pair in self.settings.profiles:
            name, _, recipe = pair.partition("=")
            if self.names.taken(name) is not None:
                continue
            try:
                await self.put_profile(name, {"fusion": recipe})
            except Exception as error:
                if api_error(error).status != 404:
                    raise RuntimeError(f"FUSION_PROFILES names {pair!r}: {error}") from error
                log.warning("profile %r waits for its adapters: %s", name, error)
        # Warm the stack of the shipped adapters, so that the first request finds it.
        for profile in list(self.registry.profiles.values())[: self.settings.max_loras]:
            try:
                async with self.pool.lease(self.names.of_profile(profile)):
                    pass
            except Exception as error:
                log.warning("profile %r cannot be served now: %s", profile.name, error)

    def _source(self, digest: str) -> Path:
        path = self.sources.get(digest)
        if path is None:
            raise ApiError(500, f"The files of adapter {digest[:12]} are gone from the store.")
        return path / ADAPTER

    def _groups(self) -> list[tuple[str, ...]]:
        groups = []
        for group in self.settings.groups:
            records = [self.registry.adapters.get(name.strip()) for name in group.split("+")]
            if all(records):
                groups.append(tuple(r.digest for r in records if r is not None))
        return groups

    def _check_groups(self) -> None:
        """Warns of declared groups that serve nothing as they are."""
        for group in self.settings.groups:
            found = {name: self.registry.adapters.get(name.strip()) for name in group.split("+")}
            missing = [name for name, record in found.items() if record is None]
            rank = sum(self.pool.rank(record.digest) for record in found.values() if record is not None)
            if missing:
                log.warning("FUSION_GROUPS: %r waits for its adapters %s", group, ", ".join(map(repr, missing)))
            if rank > self.settings.max_lora_rank:
                limit = self.settings.max_lora_rank
                log.warning("FUSION_GROUPS: %r has no stack: rank %d, over FUSION_MAX_LORA_RANK=%d", group, rank, limit)

    # Adapters

    def allowed_path(self, text: str) -> Path:
        """`text` as a real folder inside `FUSION_ADAPTER_ROOTS` (symlinks resolved); 400 otherwise."""
        try:
            path = Path(text).resolve(strict=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ApiError(400, f"{text!r} is not a folder this server can read.", param="path") from error
        roots = [Path(root).resolve() for root in self.settings.adapter_roots]
        if not any(path == root or root in path.parents for root in roots) or not path.is_dir():
            raise ApiError(400, f"{text!r} is not a folder inside FUSION_ADAPTER_ROOTS.", param="path")
        for inside in path.iterdir():
            if inside.is_symlink() and not any(r in inside.resolve().parents for r in roots):
                raise ApiError(400, f"{inside.name!r} in {text!r} points out of FUSION_ADAPTER_ROOTS.")
        return path

    async def add_adapter(self, name: str, path: Path) -> tuple[AdapterRecord, bool]:
        """Register the adapter folder at `path`; returns the record and whether it is new.

        The files are copied into the store, so the source may go. Raises `ApiError` 409 when the name is
        taken by something else, 400 when the folder is no adapter of this base or has no effect.
        """
        check_name(name)
        async with self._writing:
            adapter = await asyncio.to_thread(load, path)
            known = self.registry.adapters.get(name)
            if known is not None and known.digest == adapter.digest:
                return known, False
            if (what := self.names.taken(name)) is not None:
                raise ApiError(409, f"{name!r} is already {what}.", param="name")
            if len(self.registry.adapters) >= self.settings.max_names:
                raise ApiError(409, f"There are already {self.settings.max_names} adapters.")
            names = {self.settings.base_name, *self.settings.base_aliases}
            check_fits(adapter, self.shapes, names)
            if adapter.rank > self.settings.max_lora_rank:
                raise ApiError(
                    400,
                    f"rank {adapter.rank} is over FUSION_MAX_LORA_RANK={self.settings.max_lora_rank}.",
                )
            await asyncio.to_thread(self.sources.land, adapter.digest, lambda folder: save(adapter, folder / ADAPTER))
            recipe = parse(name)
            parents = {name: adapter.digest}
            digest = fusion_digest(recipe, base=self.names.base, parents=parents)
            try:
                effect = await self._effect(Fusion(recipe, parents, digest, name))
                info = {
                    "rank": adapter.rank,
                    "modules": len(adapter.modules),
                    "bytes": adapter.nbytes,
                    "dtype": str(adapter.dtype).removeprefix("torch."),
                    "fusion_digest": digest,
                    "effect": effect,
                }
                record = AdapterRecord(name, adapter.digest, info, now())
                await asyncio.to_thread(self.registry.add_adapter, record)
            except Exception:
                await self._drop(adapter.digest)
                raise
            return record, True

    async def _drop(self, digest: str) -> None:
        """Unload and delete an adapter's files, unless a record names them."""
        if digest not in self.registry.digests():
            await self.pool.forget(digest)
            await asyncio.to_thread(self.sources.remove, digest)

    async def _effect(self, fusion: Fusion) -> float:
        """Largest log-probability change on a probe prompt; refuses adapters without effect."""
        async with self.pool.lease(fusion) as lease:
            # One after the other: without the seam, vLLM's CPU kernels let an adapter act on base
            # requests of the same batch.
            base, moved, again = [await self.engine.probe(PROMPT, r) for r in (None, lora_request(lease), None)]
        noise, effect = distance(base, again), distance(base, moved)
        if effect <= 10 * noise:
            raise AdapterError(
                "no_effect",
                f"the adapter has no effect: probe log-probabilities moved by {effect:.1e}, two runs of "
                f"the base by {noise:.1e}",
            )
        return effect

    async def remove_adapter(self, name: str) -> None:
        """Remove an adapter no profile uses; running requests finish first."""
        async with self._writing:
            record = self.registry.adapters.get(name)
            if record is None:
                self.names.look_up(name, param="name")  # raises 404 naming the nearest
                raise ApiError(404, f"There is no adapter {name!r}.", param="name")
            if users := self.registry.users_of(record.digest):
                raise ApiError(409, f"Adapter {name!r} is used by {', '.join(users[:5])}.", param="name")
            await asyncio.to_thread(self.registry.remove_adapter, name)
            await self._drop(record.digest)

    # Profiles

    async def put_profile(self, name: str, body: Mapping[str, Any]) -> tuple[ProfileVersion, bool]:
        """Make a new version of a profile the current one; returns it and whether the profile is new."""
        check_name(name)
        if unknown := body.keys() - PROFILE_KEYS:
            known = ", ".join(sorted(PROFILE_KEYS))
            raise ApiError(400, f"Unknown key {min(unknown)!r}; a profile has {known}.", param=min(unknown))
        description = body.get("description") or ""
        if not isinstance(description, str) or len(description) > MAX_DESCRIPTION:
            raise ApiError(
                400, f"'description' is a text of at most {MAX_DESCRIPTION} characters.", param="description"
            )
        defaults = check_defaults(body.get("defaults"))
        async with self._writing:
            if name not in self.registry.profiles and (what := self.names.taken(name)):
                raise ApiError(409, f"{name!r} is already {what}.", param="name")
            if name not in self.registry.profiles and len(self.registry.profiles) >= self.settings.max_names:
                raise ApiError(409, f"There are already {self.settings.max_names} profiles.")
            fusion = self.names.of_field(body.get("fusion"))
            if fusion is None or fusion.profile is not None:
                raise ApiError(400, "A profile's 'fusion' is a recipe over adapters.", param="fusion")
            versions = self.registry.versions.get(name, {})
            if len(versions) >= MAX_VERSIONS:
                raise ApiError(409, f"{name!r} has {MAX_VERSIONS} versions, the most there can be; delete it first.")
            profile = ProfileVersion(
                name,
                max(versions, default=0) + 1,
                fusion.recipe.format(),
                dict(fusion.parents),
                fusion.digest,
                defaults,
                description,
                now(),
            )
            async with self.pool.lease(fusion):
                await asyncio.to_thread(self.registry.add_version, profile)
            return profile, profile.version == 1

    async def rollback(self, name: str, version: Any) -> ProfileVersion:
        """Make an earlier version the current one."""
        if not isinstance(version, int) or isinstance(version, bool):
            raise ApiError(400, "'version' must be a whole number.", param="version")
        async with self._writing:
            self.names.profile(f"{name}@{version}", param="version")
            return await asyncio.to_thread(self.registry.set_current, name, version)

    async def remove_profile(self, name: str) -> None:
        """Delete a profile and its versions."""
        check_name(name)
        async with self._writing:
            self.names.profile(name, param="name")
            await asyncio.to_thread(self.registry.remove_profile, name)
            self.metrics.forget(name)

    # What a fusion would be

    async def plan(self, fusion: Fusion) -> dict[str, Any]:
        """Dry run: how it would be served, and what that costs in fidelity and bytes."""
        why = self.pool.why_built(fusion)
        mixed = why is None
        recipe: Recipe = fusion.recipe

        def report() -> dict[str, Any]:
            parents = {n: load(self._source(d)) for n, d in fusion.parents.items()}
            limit = None if mixed else self.settings.max_lora_rank
            return plan(recipe, parents, max_rank=limit).to_json()

        made = await asyncio.to_thread(report)
        return {
            "recipe": recipe.format(),
            "digest": fusion.digest,
            "mode": "mixed" if mixed else "built",
            "reason": why,
            **made,
        }

    async def export(self, fusion: Fusion) -> Path:
        """A PEFT folder of the exact fusion, in a temporary place the caller removes."""
        place = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="export-", dir=self.settings.data))

        def write() -> None:
            built, report = self.pool.fuse(fusion.recipe, fusion.parents, None)
            provenance = {"recipe": fusion.recipe.format(), "digest": fusion.digest}
            save(built, place / "adapter", provenance=provenance)
            (place / "adapter" / "fusion_report.json").write_text(json.dumps(report, indent=1))

        await asyncio.to_thread(write)
        return place
