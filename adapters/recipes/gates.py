"""Which gate chooses weights for each prompt, and within which bounds."""

from collections.abc import Mapping
from dataclasses import dataclass

from adapters.recipes.names import name_text
from adapters.recipes.weights import number_text

Bounds = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Gate:
    """`by=name, adapter in low..high, …`: the gate `by` chooses the weights of the adapters that have bounds, sorted
    by name, within them.
    """

    by: str
    bounds: tuple[tuple[str, Bounds], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", tuple(sorted(self.bounds)))

    def without(self, adapter: str) -> "Gate | None":
        """The gate without one adapter's bounds; None when it has nothing left to choose."""
        rest = tuple(entry for entry in self.bounds if entry[0] != adapter)
        return Gate(self.by, rest) if rest else None

    def rename(self, names: Mapping[str, str]) -> "Gate":
        """The gate with other names, old → new, which must hold all of them."""
        return Gate(names[self.by], tuple((names[adapter], bounds) for adapter, bounds in self.bounds))

    def to_json(self) -> dict[str, object]:
        """The JSON form."""
        return {"by": self.by, "bounds": {adapter: list(bounds) for adapter, bounds in self.bounds}}

    def __str__(self) -> str:
        ranges = (f", {name_text(a)} in {number_text(low)}..{number_text(high)}" for a, (low, high) in self.bounds)
        return f"by={name_text(self.by)}{''.join(ranges)}"
