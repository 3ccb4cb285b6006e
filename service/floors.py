"""Which weight really acts of each adapter that the policy demands a least one of."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping

from service.policy_rules import Floor
from service.registry import Registry
from service.resolve import Fusion
from service.snapshot import Snapshot
from service.weight_bounds import UNKNOWN, list_places

MAX_FUSIONS = 1024
"""Fusions whose weights are kept."""


def group_names(fusion: Fusion) -> list[list[str]]:
    """The names of a recipe's adapters, together where they have one content: their weights add up."""
    groups: dict[str, list[str]] = {}
    for name in fusion.recipe.adapters:
        groups.setdefault(fusion.parents[name], []).append(name)
    return [*groups.values()]


class FloorWeights:
    """The least weights, by adapter; `digests` are the contents that a rule means."""

    def __init__(
        self, floors: Collection[Floor], registry: Registry, digests: Callable[[str, Collection[str]], set[str]]
    ) -> None:
        self._floors = floors
        self._registry = registry
        self._digests = digests
        self._known: OrderedDict[str, Mapping[str, float]] = OrderedDict()
        self._snapshot: Snapshot | None = None

    def find(self, fusion: Fusion | None) -> Mapping[str, float]:
        """The least weight, of all tokens, modules and components that a rule is about, that an adapter has in a
        fusion; 0 where it is missing, as in the base alone (None). Nothing where no weight says how much of it is left.
        """
        if not self._floors:
            return {}
        if fusion is None:
            return {rule.adapter: 0.0 for rule in self._floors}
        if self._registry.snapshot is not self._snapshot:  # names may stand for other contents
            self._snapshot = self._registry.snapshot
            self._known.clear()
        if (weights := self._known.get(fusion.digest)) is None:
            weights = self._known[fusion.digest] = self._measure(fusion)
            if len(self._known) > MAX_FUSIONS:
                self._known.popitem(last=False)
        return weights

    def _measure(self, fusion: Fusion) -> Mapping[str, float]:
        places, weights = list_places(fusion.recipe), dict[str, float]()
        for rule in self._floors:
            digests, found = self._digests(rule.adapter, rule.also), [0.0]
            for names in group_names(fusion):
                if fusion.parents[names[0]] in digests:
                    spans = [
                        [place.spans.get(name, (0.0, 0.0)) for name in names]
                        for place in places
                        if place.in_answer or rule.tokens == "all"
                    ]
                    found.append(
                        min(sum(low for low, _ in one) if UNKNOWN not in one else float("-inf") for one in spans)
                    )
            least = found[0] if len(found) == 1 else max(found[1:])  # with several contents that count, one is enough
            if least > float("-inf"):
                weights[rule.adapter] = min(weights.get(rule.adapter, least), least)
        return weights
