"""Between which weights the adapters of a recipe act, in every phase, module and component, at every outcome of a gate.

Sums are bounded by the very weights they are made of; `slerp` and `safe_merge` by what their formulas can give for any
tensors. Other methods have no weight that says how much of an adapter is left, and so no bounds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from adapters.recipes import METHODS, PROMPT, ByModule, Components, Ramp, Recipe

Span = tuple[float, float]
"""The lowest and the highest weight."""
INFINITE = float("inf")
UNKNOWN: Span = (-INFINITE, INFINITE)


@dataclass(frozen=True, slots=True)
class Place:
    """A phase of a recipe at one outcome of its gate."""

    start: int
    """PROMPT, or the token of the answer at which it begins."""
    is_whole: bool
    """Whether the weights are the same at all positions."""
    in_answer: bool
    """Whether any token of an answer has its weights."""
    outcome: str
    """Of the gate, in words; empty without one."""
    stated: Mapping[str, Span]
    """The weights that the recipe states, by adapter."""
    spans: Mapping[str, Span]
    """The weights that act, by adapter, those in a role too; `UNKNOWN` where the method has none."""

    def __str__(self) -> str:
        position = f"from token {self.start} of the answer on"
        position = "" if self.is_whole else "in the prompt" if self.start == PROMPT else position
        return " ".join(filter(None, (position, self.outcome)))


def list_places(recipe: Recipe) -> list[Place]:
    """All phases at all outcomes that can have the lowest or the highest weight of an adapter."""
    places = []
    for outcome, chosen in _list_outcomes(recipe):
        phases = chosen.phases()
        starts = {start for start, _ in phases}
        for start, phase in phases:
            stated = {term.adapter: find_span(term.weight) for term in phase.terms}
            in_answer = start != PROMPT or 0 not in starts
            places.append(Place(start, len(phases) == 1, in_answer, outcome, stated, _weigh(phase, stated)))
    return places


def find_span(weight: object) -> Span:
    """The lowest and the highest number that the weight of one phase has, in whatever module and component."""
    match weight:
        case Ramp(first, last):
            return min(first, last), max(first, last)
        case Components(numbers):
            return min(numbers), max(numbers)
        case ByModule(rules):  # whether or not a module matches
            spans = [find_span(part) for _, part in rules]
            return min(low for low, _ in spans), max(high for _, high in spans)
        case float():
            return weight, weight
    raise TypeError(f"{weight!r} is not the weight of one phase")


def _list_outcomes(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """What a gate may choose, as recipes: every weight is lowest in one of them and highest in another."""
    if recipe.gate is None:
        yield "", recipe
        return
    by, bounds = recipe.gate.by, dict(recipe.gate.bounds)
    yield f"where the gate {by!r} fails", recipe.choose({})
    yield f"where the gate {by!r} chooses the least", recipe.choose({name: low for name, (low, _) in bounds.items()})
    yield f"where the gate {by!r} chooses the most", recipe.choose({name: high for name, (_, high) in bounds.items()})


def _weigh(recipe: Recipe, stated: Mapping[str, Span]) -> Mapping[str, Span]:
    """The weights that act, of a recipe that is the same at all positions."""
    options = METHODS[recipe.method].fill(dict(recipe.options))
    match recipe.method:
        case "sum":
            return stated
        case "slerp":  # sin(aθ) / sin θ is at least a for every angle θ, and has no upper bound
            t = float(options["t"])
            least = {name: 1 - t if name == options["from"] else t for name in stated}
            return {
                name: _multiply(span, (least[name], INFINITE if 0 < least[name] < 1 else least[name]))
                for name, span in stated.items()
            }
        case "safe_merge":  # in some modules, which depend on the tensors
            share = float(options["share"])
            spans = {name: _multiply(span, (1 - share, 1.0)) for name, span in stated.items()}
            return {**spans, **dict.fromkeys(recipe.roles.values(), (0.0, share))}
    return dict.fromkeys(recipe.adapters, UNKNOWN)


def _multiply(span: Span, factor: Span) -> Span:
    """All products of a weight in `span` with a factor, which is 0 or more."""
    products = [0.0 if weight == 0 or share == 0 else weight * share for weight in span for share in factor]
    return min(products), max(products)
