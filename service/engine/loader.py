"""Loading an adapter into every worker, slice by slice (see `loads`); one adapter at a time, so that slices between two
steps of the engine do not add up.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from vllm.lora.request import LoRARequest

from service.engine.ranks import Ranks


class Loader:
    """The loads of one engine; `staged` says whether its base has pipeline stages, `dtype` what adapters become."""

    def __init__(self, ranks: Ranks, *, staged: bool, dtype: torch.dtype) -> None:
        self._ranks = ranks
        self._staged = staged
        self._dtype = dtype
        self._turn = asyncio.Lock()

    async def load(self, request: LoRARequest) -> set[str]:
        """Load vLLM's `request` into every worker; the layers that it fills.

        Raises RuntimeError when a worker loads none of its layers (with pipeline stages only when all do), has no place
        for one, or gets numbers that are not finite in the served dtype.
        """
        async with self._turn:
            args = request.lora_name, request.lora_int_id, request.lora_path
            while not all(map(all, engines := await self._ranks.call("fusion_load", *args))):
                pass
        for workers in engines:
            self._check(workers)
        return {name for workers in engines for worker in workers for name in worker["layers"]}

    def _check(self, workers: Sequence[dict[str, Any]]) -> None:
        """Raise unless the workers of one engine have all of an adapter between them."""
        layers = [worker["layers"] for worker in workers]
        if not (any(layers) if self._staged else all(layers)):
            raise RuntimeError("a worker loaded none of the adapter's layers; check its target_modules")
        if lost := set.intersection(*(set(worker["missing"]) for worker in workers)):
            raise RuntimeError(f"no worker has a LoRA layer for the adapter's {min(lost)!r}")
        if infinite := next(filter(None, (worker["infinite"] for worker in workers)), None):
            raise RuntimeError(f"the adapter's numbers overflow {self._dtype} in {infinite[0]!r}")
