"""What gates choose: the weights of each prompt of a request, and what the answer's headers say of them."""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from adapters import Readout, Recipe
from service.engine.models import GatePass, LoRARequest
from service.metrics import Metrics
from service.resolve import Fusion

MAX_LISTED = 16
"""Prompts of one request whose weights the headers tell."""
Make = Callable[[Recipe], Awaitable[LoRARequest]]


@dataclass(slots=True)
class Decisions:
    """The decisions for one request. `make` turns a recipe without a gate into the adapter that answers."""

    fusion: Fusion
    readout: Readout
    make: Make
    metrics: Metrics
    _made: list[tuple[Mapping[str, object], str]] = field(default_factory=list)

    def gate_pass(self) -> GatePass:
        """What the engine needs."""
        gate = self.fusion.recipe.gate
        assert gate is not None
        return GatePass(self.fusion.parents[gate.by], self.readout.yes, self.readout.no, self.choose)

    @property
    def any(self) -> bool:
        """Whether a prompt's weights are known."""
        return bool(self._made)

    async def choose(self, value: float | None, reason: str) -> LoRARequest:
        """The adapter at the weights that `value` stands for; None: at the recipe's own, for this reason."""
        gate = self.fusion.recipe.gate
        assert gate is not None
        chosen = {} if value is None else self.readout.choose(value, gate)
        recipe = self.fusion.recipe.choose(chosen)
        self.metrics.gates.labels("default" if value is None else "chose").inc()
        terms = cast("list[dict[str, Any]]", recipe.to_json()["adapters"])
        self._made.append(({term["name"]: term["weight"] for term in terms}, reason))
        return await self.make(recipe)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Of the answer: `x-fusion-weights`, those of its prompt, or a list of those of its first prompts."""
        weights = [one for one, _ in self._made[:MAX_LISTED]]
        text = json.dumps(weights[0] if len(self._made) == 1 else weights)
        reason = next((reason for _, reason in self._made if reason), "")
        outcome = f"default: {reason}" if reason else "chose"
        return [(b"x-fusion-weights", text.encode()), (b"x-fusion-gate", outcome.encode())]
