"""Startup check: sums are mixed only if this engine computes them correctly.

A synthetic stack of two random adapters runs several weight rows in one batch, prefill and decode:
zeros must equal the base, unit rows the single adapters. A worker without the seam ignores the rows and
serves the unit-weight stack, so every check fails.
"""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from vllm.lora.request import LoRARequest

from adapters import LoraAdapter, LoraModule, make_adapter, save, stack
from service.engine.models import mix_request
from service.engine.probe import PROMPT, distance
from service.engine.server import Engine

Shapes = Mapping[str, tuple[int, int]]

RANK = 4
MAX_ERROR = 0.1
"""The largest error that passes, as a share of the effect."""


@dataclass(frozen=True, slots=True)
class Proof:
    """The outcome, and the log-probability differences behind it: `error` is the largest between probes that must
    match, `effect` the smallest between probes that must differ.
    """

    proven: bool
    reason: str
    error: float
    effect: float


def _random_adapter(shapes: Shapes, seed: int) -> LoraAdapter:
    draw = torch.Generator().manual_seed(seed)
    modules = {}
    for name, (rows, columns) in shapes.items():
        a = torch.randn(RANK, columns, generator=draw) / columns**0.5
        b = torch.randn(rows, RANK, generator=draw) * 0.5 / RANK**0.5
        modules[name] = LoraModule(a, b, 1.0)
    return make_adapter(modules, None)


def choose_layers(shapes: Shapes, blocks: int) -> dict[str, tuple[int, int]]:
    """The layers of `blocks` transformer blocks, evenly spread from the first to the last.

    All blocks run the same code, and every pipeline stage holds some of these.
    """
    number = re.compile(r"\.(\d+)\.")
    numbered = [(int(match[1]), name) for name in shapes if (match := number.search(name))]
    last = max((n for n, _ in numbered), default=0)
    chosen = {round(i * last / max(1, blocks - 1)) for i in range(blocks)}
    return {name: shapes[name] for n, name in numbered if n in chosen} or dict(shapes)


async def prove(engine: Engine, shapes: Shapes, folder: Path) -> Proof:
    """Run the proof with synthetic adapters over dense layers `shapes` (d_out, d_in) of the base."""
    shapes = choose_layers(shapes, max(4, 2 * engine.config.parallel_config.pipeline_parallel_size))
    adapters = {"x": _random_adapter(shapes, 1), "y": _random_adapter(shapes, 2)}
    both = stack(adapters)
    files = {**adapters, "stack": both.adapter}
    loaded: dict[str, LoRARequest] = {}
    try:
        for name, adapter in files.items():
            save(adapter, folder / name)
            loaded[name] = await engine.load(folder / name, f"~proof/{name}")

        def mix(x: float, y: float) -> LoRARequest:
            return mix_request(loaded["stack"], "proof", [(RANK, x), (RANK, y)])

        rows = [None, mix(0, 0), mix(1, 0), mix(0, 1), mix(0.5, 0.5), None]
        base, zero, one_x, one_y, mixed_half, base_again = await asyncio.gather(
            *(engine.probe(PROMPT, r) for r in rows)
        )
        alone_x = await engine.probe(PROMPT, loaded["x"])
        alone_y = await engine.probe(PROMPT, loaded["y"])
    finally:
        for request in loaded.values():
            await engine.unload(request)
    must_differ = [(base, alone_x), (base, alone_y), (alone_x, alone_y), (mixed_half, alone_x)]
    effect = min(distance(*pair) for pair in must_differ)
    must_match = [(base, zero), (base, base_again), (alone_x, one_x), (alone_y, one_y)]
    error = max(distance(*pair) for pair in must_match)
    if effect <= 0 or error > MAX_ERROR * effect:
        reason = f"weights per request do not take effect: error {error:.2e}, effect {effect:.2e}"
        return Proof(False, reason, error, effect)
    return Proof(True, "zeros equal the base, unit rows equal the single adapters", error, effect)
