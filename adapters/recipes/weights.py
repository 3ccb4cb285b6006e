"""A term's weight: one number for the whole adapter, or a schedule over its layers or modules."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from adapters.errors import FusionError, clip
from adapters.recipes.globs import matches

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True, slots=True)
class Ramp:
    """`ramp(first..last)`: linear in the layer's number, from the first to the last layer that any of the
    recipe's adapters has.
    """

    first: float
    last: float

    def at(self, module: str, layers: tuple[int, int]) -> float:
        """The weight in `module`, `layers` being the lowest and the highest number."""
        number = find_layer(module)
        if number is None:
            raise FusionError(f"module {module!r} has no layer number, so {self} gives it no weight")
        low, high = layers
        share = (number - low) / (high - low) if high > low else 0.0
        return self.first + share * (self.last - self.first)

    def __str__(self) -> str:
        return f"ramp({number_text(self.first)}..{number_text(self.last)})"


@dataclass(frozen=True, slots=True)
class ByModule:
    """`{pattern: weight, …}`: the first pattern that matches a module's whole name (`*` and `?` as in file
    names) gives its weight.
    """

    rules: tuple[tuple[str, float], ...]

    def at(self, module: str, layers: tuple[int, int]) -> float:
        """The weight in `module`; FusionError when no pattern matches."""
        for pattern, weight in self.rules:
            if matches(pattern, module):
                return weight
        raise FusionError(f"no pattern of {clip(str(self))} matches the module {module!r}: add '*' as the last one")

    def __str__(self) -> str:
        return "{" + ", ".join(f"{pattern}: {number_text(weight)}" for pattern, weight in self.rules) + "}"


Schedule = Ramp | ByModule
Weight = float | Schedule


def weight_at(weight: Weight, module: str, layers: tuple[int, int]) -> float:
    """The weight in one module, `layers` being the lowest and the highest layer number."""
    return weight if isinstance(weight, float) else weight.at(module, layers)


def weight_text(weight: Weight) -> str:
    """The canonical text of a weight; the grammar reads it back."""
    return number_text(weight) if isinstance(weight, float) else str(weight)


def weight_json(weight: Weight) -> object:
    """The JSON form: a number, `{"ramp": [first, last]}` or `{pattern: number, …}`."""
    if isinstance(weight, Ramp):
        return {"ramp": [weight.first, weight.last]}
    return dict(weight.rules) if isinstance(weight, ByModule) else weight


def number_text(value: float) -> str:
    """The shortest decimal that reads back as the same float."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def find_layer(module: str) -> int | None:
    """The number in a module's name (`model.layers.7.mlp.up_proj` is 7), None when there is none."""
    match = _LAYER.search(module)
    return int(match[1]) if match else None


def layer_range(modules: Iterable[str]) -> tuple[int, int]:
    """The lowest and the highest layer number among `modules`; (0, 0) when none has one."""
    numbers = [number for module in modules if (number := find_layer(module)) is not None]
    return (min(numbers), max(numbers)) if numbers else (0, 0)
