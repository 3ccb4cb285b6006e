"""Startup check: sums are mixed only if this engine computes them correctly.

A synthetic stack of two random adapters runs several weight rows in one batch, prefill and decode:
zeros must equal the base, unit rows the single adapters. A worker without the seam ignores the rows and
serves the unit-weight stack, so every check fails. Then the same for weights by module and by position: what fails
there alone leaves one number per adapter.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from vllm.lora.request import LoRARequest

from adapters import PROMPT as FROM_PROMPT, LoraAdapter, LoraModule, make_adapter, save, stack
from service.engine.models import mix_request
from service.engine.probe import PROMPT, Probe, distance
from service.engine.server import Engine
from service.engine.weights import Phase, Weights

log = logging.getLogger("fusion")

Shapes = Mapping[str, tuple[int, int]]
Pairs = Sequence[tuple[Probe, Probe]]
RunProbe = Callable[[Sequence[int], LoRARequest | None], Awaitable[Probe]]

RANK = 4
MAX_ERROR, MAX_ROUNDED_ERROR = 0.1, 0.5
"""The largest error that passes, as a share of the effect, in float32 and in 16 bits: there the same numbers in another
batch are rounded otherwise, by up to a quarter of the effect. A worker without the seam errs by all of it.
"""


@dataclass(frozen=True, slots=True)
class Proof:
    """The outcome, and the log-probability differences behind it: `error` is the largest between probes that must
    match, `effect` the smallest between probes that must differ.
    """

    proven: bool
    reason: str
    error: float
    effect: float
    tables: bool = False
    """Whether weights by module and by rank component are right, too."""
    phases: bool = False
    """Whether weights by position are."""
    limits: str = ""
    """Why one of them is not, where mixing is proven."""
    engines: int = 0
    """How many engines it ran on: all of them (`--data-parallel-size`)."""
    ranks: int = 0
    """How many workers of these computed a part of it: all of them."""


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


class _Loaded:
    """Synthetic adapters of the proof, in `folder` and in the engine until `unload`."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.requests: dict[str, LoRARequest] = {}
        self._engine = engine
        self._folder = folder

    async def load(self, name: str, adapter: LoraAdapter) -> None:
        save(adapter, self._folder / name)
        self.requests[name] = await self._engine.load(self._folder / name, f"~proof/{name}")

    async def unload(self) -> None:
        for request in self.requests.values():
            await self._engine.unload(request)

    def mix(self, *weights: float) -> LoRARequest:
        return mix_request(self.requests["stack"], "proof", [(RANK, weight) for weight in weights])

    def function(self, *phases: Phase) -> LoRARequest:
        return mix_request(self.requests["stack"], "proof", Weights((RANK, RANK), phases))


def _scale(both: LoraAdapter, weights: Mapping[str, torch.Tensor]) -> LoraAdapter:
    """An ordinary adapter that does what the stack `both` does with `weights` [coordinates] of each module."""
    modules = {name: LoraModule(m.a, m.b * weights[name], 1.0) for name, m in both.modules.items()}
    return make_adapter(modules, None)


async def prove(engine: Engine, shapes: Shapes, folder: Path) -> Proof:
    """Run the proof with synthetic adapters over dense layers `shapes` (d_out, d_in) of the base.

    Row i of every table of weights is from then on that of the i-th of `shapes` (`Engine.number_modules`).
    """
    chosen = choose_layers(shapes, max(4, 2 * engine.config.parallel_config.pipeline_parallel_size))
    adapters = {"x": _random_adapter(chosen, 1), "y": _random_adapter(chosen, 2)}
    both = stack(adapters).adapter
    loaded, engines = _Loaded(engine, folder), range(engine.engines)
    try:
        for name, adapter in {**adapters, "stack": both}.items():
            await loaded.load(name, adapter)
        proof = _join([await _prove_mixing(engine, partial(engine.probe, engine=i), loaded) for i in engines])
        if not proof.proven:
            return proof
        held = await engine.layers(loaded.requests["stack"])
        if not all(held):
            reason = f"{held.count({})} of {len(held)} ranks hold no layer that the proof could try"
            return replace(proof, proven=False, reason=reason)
        proof = replace(proof, engines=engine.engines, ranks=len(held))
        try:
            await engine.number_modules(list(shapes))
            table = torch.rand(len(shapes), 2 * RANK, generator=torch.Generator().manual_seed(3)) * 2 - 0.5
            rows = {name: table[row] for row, name in enumerate(shapes) if name in both.modules}
            await loaded.load("table", _scale(both, rows))
            probes = [partial(engine.probe, engine=i) for i in engines]
            return _join([await _prove_functions(engine, probe, loaded, table, proof) for probe in probes])
        except Exception as error:  # without it, one number per adapter is mixed
            if not engine.alive:
                raise
            log.exception("the proof of weights by module and by position failed")
            return replace(proof, limits=f"the proof of more than one number per adapter could not run: {error!r:.200}")
    finally:
        await loaded.unload()


def _join(proofs: Sequence[Proof]) -> Proof:
    """What holds on all engines, of each of which there is a proof, and why something does not."""
    if len(proofs) == 1:
        return proofs[0]
    failed = next((i for i, proof in enumerate(proofs) if not proof.proven), None)
    return replace(
        proofs[0],
        proven=failed is None,
        reason=proofs[0].reason if failed is None else f"on engine {failed}: {proofs[failed].reason}",
        error=max(proof.error for proof in proofs),
        effect=min(proof.effect for proof in proofs),
        tables=all(proof.tables for proof in proofs),
        phases=all(proof.phases for proof in proofs),
        limits="; ".join(f"on engine {i}: {proof.limits}" for i, proof in enumerate(proofs) if proof.limits),
    )


async def _prove_mixing(engine: Engine, probe: RunProbe, loaded: _Loaded) -> Proof:
    """One number per adapter, on the engine that `probe` asks."""
    mix = loaded.mix
    rows = [None, mix(0, 0), mix(1, 0), mix(0, 1), mix(0.5, 0.5), None]
    base, zero, one_x, one_y, mixed_half, base_again = await asyncio.gather(*(probe(PROMPT, r) for r in rows))
    alone_x = await probe(PROMPT, loaded.requests["x"])
    alone_y = await probe(PROMPT, loaded.requests["y"])
    must_differ = [(base, alone_x), (base, alone_y), (alone_x, alone_y), (mixed_half, alone_x)]
    effect = min(distance(*pair) for pair in must_differ)
    must_match = [(base, zero), (base, base_again), (alone_x, one_x), (alone_y, one_y)]
    error = max(distance(*pair) for pair in must_match)
    if effect <= 0 or error > _max_error(engine) * effect:
        reason = f"weights per request do not take effect: error {error:.2e}, effect {effect:.2e}"
        return Proof(False, reason, error, effect)
    return Proof(True, "zeros equal the base, unit rows equal the single adapters", error, effect)


async def _prove_functions(
    engine: Engine, probe: RunProbe, loaded: _Loaded, table: torch.Tensor, proof: Proof
) -> Proof:
    """Weights by module and rank component against an ordinary adapter, and by position against a longer prompt, also
    when that is known; on the engine that `probe` asks.
    """
    x, y = [1.0, 0.0], [0.0, 1.0]
    longer = (*PROMPT, PROMPT[0])  # the token that every probe is held to
    work = [
        (PROMPT, None),
        (PROMPT, loaded.function(Phase(FROM_PROMPT, table.numpy()))),
        (PROMPT, loaded.mix(1, 0)),
        (PROMPT, loaded.function(Phase(FROM_PROMPT, x), Phase(1, y))),
        (longer, loaded.function(Phase(FROM_PROMPT, x), Phase(0, y))),
        (PROMPT, loaded.function(Phase(FROM_PROMPT, [0.0, 0.0]), Phase(len(longer), x))),
    ]
    base, by_module, only_x, switched, sooner, idle = await asyncio.gather(*(probe(*item) for item in work))
    again = await probe(*work[4])  # its prompt is known up to the last position (`tails`)
    alone = await probe(PROMPT, loaded.requests["table"])
    base_alone = await probe(PROMPT, None)
    tables = _compare(
        [(by_module, alone), (base, base_alone)], [(by_module, base), (by_module, only_x)], _max_error(engine)
    )
    phases = _compare(
        [(switched[:1], only_x[:1]), (switched[1:], sooner[:-1]), (again, sooner), (idle, base), (base, base_alone)],
        [(switched[1:2], only_x[1:2])],
        _max_error(engine),
    )
    limits = [
        *([f"by module: {tables}"] if tables else []),
        *([f"by position: {why}"] if (why := phases or engine.why_no_phases) else []),
    ]
    return replace(proof, tables=not tables, phases=not why, limits="; ".join(limits))


def _max_error(engine: Engine) -> float:
    return MAX_ERROR if engine.config.model_config.dtype == torch.float32 else MAX_ROUNDED_ERROR


def _compare(must_match: Pairs, must_differ: Pairs, max_error: float) -> str | None:
    """What is wrong when probes do not match, or do not differ; None when they do."""
    error, effect = max(distance(*pair) for pair in must_match), min(distance(*pair) for pair in must_differ)
    wrong = effect <= 0 or error > max_error * effect
    return f"weights do not take effect: error {error:.2e}, effect {effect:.2e}" if wrong else None
