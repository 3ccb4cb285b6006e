"""Policies over a registry without an engine, and what each weight of a recipe is, computed the plain way."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from adapters import PROMPT, ByModule, Components, Fade, Ramp, Recipe, Steps
from service.policy import Policy
from service.policy_rules import Rules
from service.registry import Registry
from tests.adapters import samples

TOKENS, RANK = 24, 3
MODULES = [*samples.SHAPES]
LAYERS = 2


def make_policy(registry: Registry, max_rank: int = 16, **tables: Any) -> Policy:
    """A policy of these rules."""
    return Policy(Rules.model_validate(tables), registry, max_rank=max_rank)


def weigh(weight: Any, module: str, component: int, token: int, *, answer: bool) -> float | None:
    """One weight at one place, as docs/recipes.md says it; None where no pattern matches, which no engine is given."""
    if answer and token == PROMPT:
        return 0.0
    match weight:
        case Ramp(first, last):
            layer = int(module.split(".")[2])
            return first + (last - first) * layer / (LAYERS - 1)
        case Components(numbers):
            return numbers[component % len(numbers)]
        case Steps(rules):
            level: Any = 0.0
            for start, value in rules:
                if start <= token:
                    level = value
            return weigh(level, module, component, token, answer=False)
        case Fade(first, last, tokens):
            count = min(tokens, 7 if answer else 8)
            step = sum(index * tokens // count <= max(token, 0) for index in range(1, count))
            return first + (last - first) * step / (count - 1)
        case ByModule(rules):
            part = next((course for pattern, course in rules if fnmatchcase(module, pattern)), None)
            return None if part is None else weigh(part, module, component, token, answer=False)
    return float(weight)


def list_outcomes(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """The weights at corners of what a gate may choose, and at the stated ones."""
    yield dict(recipe.weights)
    names = [name for name, _ in recipe.gate.bounds] if recipe.gate else []
    for corner in range(2 ** len(names)):
        chosen = {n: recipe.gate.bounds[i][1][corner >> i & 1] for i, n in enumerate(names) if recipe.gate}
        yield {**recipe.weights, **chosen}


def list_weights(recipe: Recipe) -> Iterator[tuple[int, dict[str, float]]]:
    """The weights of a sum at every token, in every module and component and at every corner of a gate, by adapter."""
    for weights in list_outcomes(recipe):
        for token in range(PROMPT, TOKENS):
            for module in MODULES:
                for component in range(RANK):
                    found = {
                        name: weigh(weight, module, component, token, answer=recipe.answer)
                        for name, weight in weights.items()
                    }
                    if None not in found.values():
                        yield token, found  # type: ignore[misc]  # no None in it
