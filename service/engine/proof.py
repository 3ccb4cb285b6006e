"""Proof before use: mixing is served only after it was seen to be right on this very engine.

A synthetic stack of two random adapters runs several weight rows in one batch, prefill and decode:
zeros must equal the base, unit rows the single adapters. A worker without the seam ignores the rows and
serves the unit-weight stack, which no comparison here survives.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from adapters import LoraAdapter, LoraModule, make_adapter, save, stack
from service.engine.names import mix_name
from service.engine.server import Engine, LoRARequest

RANK = 4
PROMPT = tuple(range(300, 324))


@dataclass(frozen=True, slots=True)
class Proof:
    """Outcome: `proven`, why not, and the largest log-probability differences behind it."""

    proven: bool
    reason: str
    error: float
    effect: float


def _synthetic(shapes: Mapping[str, tuple[int, int]], seed: int) -> LoraAdapter:
    draw = torch.Generator().manual_seed(seed)
    modules = {}
    for name, (rows, columns) in shapes.items():
        a = torch.randn(RANK, columns, generator=draw) / columns**0.5
        b = torch.randn(rows, RANK, generator=draw) * 0.5 / RANK**0.5
        modules[name] = LoraModule(a, b, 1.0)
    return make_adapter(modules, None)


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=False))


async def prove(engine: Engine, shapes: Mapping[str, tuple[int, int]], folder: Path) -> Proof:
    """Run the proof with synthetic adapters over the dense layers `shapes` (d_out, d_in) of the base."""
    adapters = {"x": _synthetic(shapes, 1), "y": _synthetic(shapes, 2)}
    both = stack(adapters)
    files = {**adapters, "stack": both.adapter}
    loaded: dict[str, LoRARequest] = {}
    try:
        for name, adapter in files.items():
            save(adapter, folder / name)
            loaded[name] = await engine.load(folder / name, f"~proof/{name}")

        def mix(x: float, y: float) -> LoRARequest:
            row = mix_name("proof", [(RANK, x), (RANK, y)])
            own = loaded["stack"]
            return LoRARequest(row, own.lora_int_id, own.lora_path)

        run = engine.log_probabilities
        rows = [None, mix(0, 0), mix(1, 0), mix(0, 1), mix(0.5, 0.5), None]
        base, zero, one_x, one_y, half, again = await asyncio.gather(*(run(PROMPT, r) for r in rows))
        alone_x, alone_y = await run(PROMPT, loaded["x"]), await run(PROMPT, loaded["y"])
    finally:
        for request in loaded.values():
            await engine.unload(request)
    # Prompt positions only decide the effect: sampled tokens differ between different adapters.
    n = len(PROMPT) - 1
    effect = min(
        _distance(base[:n], alone_x[:n]),
        _distance(base[:n], alone_y[:n]),
        _distance(alone_x[:n], alone_y[:n]),
        _distance(half[:n], alone_x[:n]),
    )
    error = max(
        _distance(base, zero),
        _distance(base, again),
        _distance(alone_x, one_x),
        _distance(alone_y, one_y),
    )
    if effect <= 0 or error > 0.1 * effect:
        reason = f"weights per request do not take effect: error {error:.2e}, effect {effect:.2e}"
        return Proof(False, reason, error, effect)
    return Proof(True, "zeros equal the base, unit rows equal the single adapters", error, effect)
