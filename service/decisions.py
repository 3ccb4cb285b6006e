"""What gates choose: the weights of each prompt of a request, and what the answer's headers say of them."""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from adapters import Readout, Recipe
from service.engine.models import Choose, GatePass, LoRARequest
from service.metrics import Metrics
from service.resolve import Fusion

MAX_HEADER = 2048
"""Bytes of `x-fusion-weights`: it has the first prompts, as many as fit."""
Make = Callable[[Recipe], Awaitable[LoRARequest]]


@dataclass(slots=True)
class Decisions:
    """The decisions for one request. `make` turns a recipe without a gate into the adapter that answers."""

    fusion: Fusion
    readout: Readout
    make: Make
    metrics: Metrics
    _begun: int = 0
    """Prompts whose gate has been asked."""
    _made: dict[int, tuple[Mapping[str, object], str]] = field(default_factory=dict)
    """Weights, and why they are the default ones, by the prompt's number: gates do not answer in order."""

    def gate_pass(self) -> GatePass:
        """What the engine needs."""
        gate = self.fusion.recipe.gate
        assert gate is not None
        return GatePass(self.fusion.parents[gate.by], self.readout.yes, self.readout.no, self.begin)

    @property
    def any(self) -> bool:
        """Whether a prompt's weights are known."""
        return bool(self._made)

    @property
    def complete(self) -> bool:
        """Whether the weights are known of all prompts whose gate has been asked."""
        return 0 < self._begun == len(self._made)

    def outcomes(self) -> list[dict[str, object]]:
        """The weights of each prompt that are known, and why they are the default ones, empty where the gate chose."""
        return [{"weights": dict(weights), "default": reason} for _, (weights, reason) in sorted(self._made.items())]

    def begin(self) -> Choose:
        """What decides for the next prompt."""
        self._begun += 1
        return partial(self._choose, self._begun - 1)

    async def _choose(self, number: int, value: float | None, reason: str) -> LoRARequest:
        """The adapter at the weights that `value` stands for; None: at the recipe's own, for this reason."""
        gate = self.fusion.recipe.gate
        assert gate is not None
        chosen = {} if value is None else self.readout.choose(value, gate)
        recipe = self.fusion.recipe.choose(chosen)
        self.metrics.gates.labels("default" if value is None else "chose").inc()
        terms = cast("list[dict[str, Any]]", recipe.to_json()["adapters"])
        self._made[number] = {term["name"]: term["weight"] for term in terms}, reason
        return await self.make(recipe)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Of the answer: `x-fusion-weights`, those of its prompt, or a list of those of its first prompts."""
        made = [one for _, one in sorted(self._made.items())]
        reason = next((reason for _, reason in made if reason), "")
        headers = [(b"x-fusion-gate", (f"default: {reason}" if reason else "chose").encode())]
        texts, size = list[str](), 0
        for weights, _ in made:
            text = json.dumps(weights)
            if (size := size + len(text) + 2) > MAX_HEADER:
                break
            texts.append(text)
        if texts:
            text = texts[0] if len(made) == 1 else f"[{', '.join(texts)}]"
            headers.append((b"x-fusion-weights", text.encode()))
        return headers
