"""Register adapters from folders once they prove to have an effect, and remove them."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adapters import AdapterError, LoraAdapter, check_name, load, parse
from adapters.files import SHIPPED, adapter_path
from service.base_model import Shapes, check_fits
from service.engine.models import LoRARequest, mix_request
from service.engine.probe import PROMPT, distance
from service.errors import ApiError
from service.materializer import Materializer
from service.pool import Pool
from service.registry import AdapterRecord, Registry, now
from service.resolve import Fusion, Names
from service.settings import Settings

EFFECT_OVER_NOISE = 10
"""A probe must move log-probabilities by this many times the difference of two runs of the base."""


class Prober(Protocol):
    """The part of the engine that shows an adapter's effect."""

    async def probe(self, prompt: Sequence[int], lora: LoRARequest | None) -> list[dict[int, float]]:
        """Log-probabilities of the likeliest tokens after `prompt`, one dict per step."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """Adds and removes adapters, one change at a time."""

    settings: Settings
    registry: Registry
    names: Names
    materializer: Materializer
    pool: Pool
    engine: Prober
    shapes: Shapes
    writing: asyncio.Lock
    """Held by everything that changes the registry."""

    def resolve_path(self, text: str) -> Path:
        """The folder `text` names: in `FUSION_ADAPTER_ROOTS`, symlinks resolved, or `shipped:NAME`; else 400."""
        if text.startswith(SHIPPED):
            return adapter_path(text)
        try:
            path = Path(text).resolve(strict=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ApiError(400, f"{text!r} is not a folder this server can read.", param="path") from error
        roots = [Path(root).resolve() for root in self.settings.adapter_roots]
        if not any(path == root or root in path.parents for root in roots) or not path.is_dir():
            message = f"{text!r} is not a folder inside FUSION_ADAPTER_ROOTS; use one there, or upload a .tar."
            raise ApiError(400, message, param="path")
        for inside in path.iterdir():
            if inside.is_symlink() and not any(root in inside.resolve().parents for root in roots):
                raise ApiError(400, f"{inside.name!r} in {text!r} is a link out of FUSION_ADAPTER_ROOTS.", param="path")
        return path

    async def add(self, name: str, path: Path) -> tuple[AdapterRecord, bool]:
        """Register the adapter folder at `path`; returns the record and whether it is new.

        The files are copied into the store, so the source may go. Raises `ApiError` 409 when something else has the
        name, `AdapterError` when the folder does not hold an adapter of this base or the adapter has no effect.
        """
        check_name(name)
        async with self.writing:
            adapter = await asyncio.to_thread(load, path)
            known = self.registry.adapters.get(name)
            if known is not None and known.digest == adapter.digest:
                return known, False
            self._check_new(name, adapter)
            await asyncio.to_thread(self.materializer.add, adapter)
            info = {
                "rank": adapter.rank,
                "modules": len(adapter.modules),
                "bytes": adapter.nbytes,
                "dtype": str(adapter.dtype).removeprefix("torch."),
            }
            record = AdapterRecord(name, adapter.digest, info, now())
            try:
                record = await self._prove_effect(record)
                await asyncio.to_thread(self.registry.add_adapter, record)
            except Exception:
                await self._delete_unused(adapter.digest)
                raise
            return record, True

    async def remove(self, name: str) -> None:
        """Remove an adapter no profile uses; running requests finish first."""
        async with self.writing:
            record = self.registry.adapters.get(name)
            if record is None:
                self.names.look_up(name, param="name")  # raises 404 naming the nearest
                raise ApiError(404, f"{name!r} is not an adapter; GET /v1/adapters lists them.", param="name")
            if users := self.registry.pinning_profiles(record.digest):
                message = f"Adapter {name!r} is used by {', '.join(users[:5])}; delete these profiles first."
                raise ApiError(409, message, param="name")
            await asyncio.to_thread(self.registry.remove_adapter, name)
            await self._delete_unused(record.digest)

    def _check_new(self, name: str, adapter: LoraAdapter) -> None:
        """Raise unless `name` is free and this server can serve `adapter`."""
        if (owner := self.names.owner(name)) is not None:
            raise ApiError(409, f"{name!r} is already {owner}; choose another name.", param="name")
        if len(self.registry.adapters) >= self.settings.max_names:
            raise ApiError(409, f"There are already {self.settings.max_names} adapters, the limit; delete one first.")
        check_fits(adapter, self.shapes, {self.settings.base_name, *self.settings.base_aliases})
        if adapter.rank > (limit := self.settings.max_lora_rank):
            raise ApiError(
                400, f"The adapter's rank {adapter.rank} is over FUSION_MAX_LORA_RANK={limit}; raise that setting."
            )

    async def _prove_effect(self, record: AdapterRecord) -> AdapterRecord:
        """`record` with its fusion's digest and its effect; AdapterError when it has none."""
        fusion = self.names.bind(parse(record.name), [record])
        info: Mapping[str, Any] = {"fusion_digest": fusion.digest, "effect": await self._measure_effect(fusion)}
        return AdapterRecord(record.name, record.digest, {**record.info, **info}, record.created)

    async def _measure_effect(self, fusion: Fusion) -> float:
        """Largest log-probability change on a probe prompt; refuses adapters without effect."""
        async with self.pool.lease(fusion) as lease:
            request = mix_request(lease.resident.request, lease.resident.key, lease.spans)
            # One after the other: without the seam, vLLM's CPU kernels let an adapter act on base
            # requests of the same batch.
            base, adapted, base_again = [await self.engine.probe(PROMPT, lora) for lora in (None, request, None)]
        noise, effect = distance(base, base_again), distance(base, adapted)
        if effect <= EFFECT_OVER_NOISE * noise:
            raise AdapterError(
                "no_effect",
                f"the adapter has no effect: probe log-probabilities moved by {effect:.1e}, two runs of "
                f"the base differ by {noise:.1e}; check that it was trained, and saved after training",
            )
        return effect

    async def _delete_unused(self, digest: str) -> None:
        """Unload and delete an adapter's files, unless a record names them."""
        if digest not in self.registry.needed_digests():
            await self.pool.forget(digest)
            await asyncio.to_thread(self.materializer.remove, digest)
