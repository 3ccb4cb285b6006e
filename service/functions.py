"""The weights of a fusion as the engine takes them: one number per adapter, or functions of module and position."""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from adapters import PROMPT, FusionError, LoraAdapter, Recipe, WeightTable, tabulate
from service.client_turns import ClientTurns
from service.engine.weights import Phase, Weights
from service.errors import ApiError
from service.resolve import Fusion

Spans = tuple[tuple[int, float], ...]
"""(width, weight) of each coordinate range of a stack."""
Table = NDArray[np.float32]
Key = tuple[str, str, tuple[str, ...]]
Run = Callable[[Callable[[], Weights]], Awaitable[Weights]]
Check = Callable[[Fusion, Mapping[str, float]], None]
MAX_ADAPTERS = 256
"""Adapters whose files' headers are remembered."""
MAX_BYTES = 64 * 2**20
"""Of all functions that are remembered."""


def is_uniform(recipe: Recipe) -> bool:
    """Whether the weights of a plain sum are one number per adapter at every position."""
    return recipe.method == "sum" and all(
        isinstance(weight, float) for _, phase in recipe.phases() for weight in phase.weights.values()
    )


def list_spans(fusion: Fusion, recipe: Recipe, widths: Mapping[str, int]) -> Spans:
    """The weights of a plain sum over a stack whose adapters have these widths, by digest."""
    weights = dict.fromkeys(widths, 0.0)
    for name, weight in recipe.weights.items():
        assert isinstance(weight, float)
        weights[fusion.parents[name]] += weight
    return tuple((width, weights[digest]) for digest, width in widths.items())


@dataclass(frozen=True, slots=True)
class _Rows:
    """Puts weight tables into the order of the engine's modules and a stack's ranges."""

    modules: Mapping[str, int]
    widths: Mapping[str, int]
    parents: Mapping[str, str]

    def arrange(self, table: WeightTable) -> Table:
        """float32 [modules, ranges], or [modules, coordinates] where components have weights of their own."""
        rows = [self.modules[module] for module in table.modules]
        by_component = bool(table.components)
        starts = dict(zip(self.widths, np.cumsum([0, *self.widths.values()])[:-1].tolist(), strict=True))
        total = sum(self.widths.values()) if by_component else len(self.widths)
        values = np.zeros((len(self.modules), total))
        for column, name in enumerate(table.adapters):
            digest = self.parents[name]
            weights = table.weights[:, column].numpy()
            if not by_component:
                values[rows, list(self.widths).index(digest)] += weights
                continue
            width = self.widths[digest]
            factors = np.ones(width)
            numbers = table.components.get(name, ())
            factors[: len(numbers)] = numbers
            values[rows, starts[digest] : starts[digest] + width] += np.outer(weights, factors)
        return values.astype(np.float32)


class Functions:
    """Computes weights; tables in a thread, once for each fusion and stack as long as they fit into the memory."""

    def __init__(
        self,
        read: Callable[[str], LoraAdapter],
        modules: Sequence[str],
        run: Run,
        check: Check,
        turns: ClientTurns,
    ) -> None:
        self._read = lru_cache(MAX_ADAPTERS)(read)
        self._modules = {module: row for row, module in enumerate(modules)}
        self._run = run
        self._turns = turns
        self._check = check
        """Raises for weights, the largest by adapter, that are too large."""
        self._known: OrderedDict[Key, Weights] = OrderedDict()
        self._bytes = 0

    async def weigh(self, fusion: Fusion, widths: Mapping[str, int], client: str | None = None) -> Spans | Weights:
        """The weights of a linear recipe over the stack whose adapters have these `widths`, by digest; of one with a
        gate, those of the gate's own pass; `client` asks for them.

        `ApiError` 400 when the table cannot be made, as for a pattern that matches no module.
        """
        recipe = fusion.recipe
        if recipe.gate is not None:
            return _weigh_gate(fusion.parents[recipe.gate.by], widths)
        if recipe.is_sum:
            return list_spans(fusion, recipe, widths)
        if is_uniform(recipe):
            return Weights(
                tuple(widths.values()),
                tuple(Phase(start, [w for _, w in list_spans(fusion, one, widths)]) for start, one in recipe.phases()),
            )
        key = (fusion.digest, recipe.format(), tuple(widths))  # a gate's fusion has many recipes
        if key not in self._known:
            try:
                async with self._turns.hold(client):
                    if key not in self._known:  # others may have asked for it meanwhile
                        self._remember(key, await self._run(lambda: self._tabulate(fusion, widths)))
            except (FusionError, ValueError) as error:
                raise ApiError(400, f"{error}.", param="model") from error
        self._known.move_to_end(key)
        return self._known[key]

    def _tabulate(self, fusion: Fusion, widths: Mapping[str, int]) -> Weights:
        adapters = {name: self._read(fusion.parents[name]) for name in fusion.recipe.adapters}
        rows = _Rows(self._modules, widths, fusion.parents)
        tables = [(start, tabulate(one, adapters, same_base=True)) for start, one in fusion.recipe.phases()]
        if fusion.recipe.method != "sum":  # whose weights are as stated, and were checked
            largest = torch.stack([table.weights.abs().amax(0) for _, table in tables]).amax(0).tolist()
            self._check(fusion, dict(zip(tables[0][1].adapters, largest, strict=True)))
        return Weights(tuple(widths.values()), tuple(Phase(start, rows.arrange(table)) for start, table in tables))

    def _remember(self, key: Key, weights: Weights) -> None:
        if key in self._known:  # another request was sooner
            return
        self._known[key] = weights
        self._bytes += _count_bytes(weights)
        while self._bytes > MAX_BYTES and len(self._known) > 1:
            _, oldest = self._known.popitem(last=False)
            self._bytes -= _count_bytes(oldest)


def _weigh_gate(gate: str, widths: Mapping[str, int]) -> Weights:
    """The weights of a gate's own pass: the gate alone, at the prompt's last position."""
    alone = [float(digest == gate) for digest in widths]
    return Weights(tuple(widths.values()), (Phase(PROMPT, [0.0] * len(widths)), Phase(0, alone)))


def _count_bytes(weights: Weights) -> int:
    return 3 * sum(phase.weights.nbytes for phase in weights.phases)  # the name, too
