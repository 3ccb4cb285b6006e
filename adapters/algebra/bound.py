"""A recipe bound to its adapters: the input of every fusion step."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from adapters.adapter import LoraAdapter, LoraModule
from adapters.algebra.combine import Context, WeightedUpdate
from adapters.algebra.factors import Device, spread, stack_factors
from adapters.algebra.lowrank import FactorPair
from adapters.errors import FusionError, UnknownAdapterError, quote
from adapters.recipes import METHODS, Method, Recipe, name_text
from adapters.recipes.method import Value
from adapters.recipes.weights import Components, Weight, layer_range, list_numbers, weights_at
from adapters.together import check_together

BATCH_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Batch:
    """Modules of one shape by name, each with the updates of the same adapters at the same ranks, its parents."""

    parents: Mapping[str, Sequence[WeightedUpdate]]

    @property
    def rank(self) -> int:
        """The parents' ranks added up."""
        return sum(parent.module.rank for parent in next(iter(self.parents.values())))

    def stack(self, dtype: torch.dtype, device: Device) -> FactorPair:
        """The parents' factors side by side, unscaled: n×d_out×rank and n×rank×d_in."""
        return stack_factors([[parent.module for parent in row] for row in self.parents.values()], dtype, device)

    def scale(self, device: Device) -> Tensor:
        """Weight times scaling of each coordinate of the stack, n×1×rank float64."""
        return spread(
            [[(parent.factor, parent.module.rank) for parent in row] for row in self.parents.values()], device
        )


@dataclass(frozen=True, slots=True)
class BoundRecipe:
    """A validated recipe, its adapters, and the shapes, layers and dtype derived from both."""

    recipe: Recipe
    weights: Mapping[str, Weight]
    """The recipe's, by adapter."""
    adapters: Mapping[str, LoraAdapter]
    method: Method
    options: Mapping[str, Value]
    shapes: Mapping[str, tuple[int, int]]
    layers: tuple[int, int]
    max_rank: int | None
    device: Device
    dtype: torch.dtype
    """The result's: by default the adapters' promoted dtype."""
    answer_only: bool
    """Whether the result acts on the answer alone: all that acts does, or the recipe has no weight in the prompt."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """`dtype`, promoted to at least float32."""
        return torch.promote_types(self.dtype, torch.float32)

    def batches(self) -> Iterator[Batch]:
        """Yield all modules, in batches of at most BATCH_BYTES (a larger module goes alone)."""
        groups: dict[tuple[tuple[int, int], tuple[str, ...], tuple[int, ...]], list[str]] = {}
        for module, shape in self.shapes.items():
            parents = tuple(name for name, adapter in self.adapters.items() if module in adapter.facts)
            ranks = tuple(self.adapters[name].facts[module].rank for name in parents)
            groups.setdefault((shape, parents, ranks), []).append(module)
        for ((d_out, d_in), _, ranks), modules in groups.items():
            count = max(1, BATCH_BYTES // ((d_out + d_in) * sum(ranks) * 8))
            for start in range(0, len(modules), count):
                yield Batch({module: self.parents(module) for module in modules[start : start + count]})

    def parents(self, module: str) -> tuple[WeightedUpdate, ...]:
        """The update of every adapter that has `module`, at its weight there; in a role at weight 1. Weights by
        component are in the factors.
        """
        parents = []
        for name, adapter in self.adapters.items():
            if module in adapter.facts:
                weight, factors = self.weights.get(name, 1.0), adapter.modules[module]
                if isinstance(weight, Components):
                    factors = _scale(factors, weight)
                parents.append(WeightedUpdate(name, adapter, self.weigh(name, [module])[module], factors))
        return tuple(parents)

    def weigh(self, name: str, modules: Iterable[str]) -> dict[str, float]:
        """The weight of an adapter in each module, 1 in a role; besides the weights by component, which it may have."""
        return weights_at(self.weights.get(name, 1.0), modules, self.layers)

    def nonzero_terms(self, parents: Sequence[WeightedUpdate]) -> list[WeightedUpdate]:
        """The parents that add to the result: terms of a weight other than zero."""
        return [parent for parent in parents if parent.name in self.weights and parent.weight != 0.0]

    def context(self, module: str, parents: Sequence[WeightedUpdate]) -> Context:
        """The options, the role adapters' updates and the device with which the method computes `module`."""
        by_name = {parent.name: parent.module for parent in parents}
        roles = {option: by_name.get(name) for option, name in self.recipe.roles.items()}
        return Context(module, self.method, self.options, roles, self.device)

    def is_plain(self, parents: Sequence[WeightedUpdate]) -> bool:
        """Whether the module's update is the weighted sum of all its parents, as they are."""
        is_sum = self.method.on == "factors" and self.method.combine == "sum"
        return is_sum and len(self.nonzero_terms(parents)) == len(parents)

    def rank_limit(self, terms: Sequence[WeightedUpdate]) -> int | None:
        """The rank above which the module's update is truncated, None for no limit."""
        method_limit: int | None = None
        if "rank" in self.options:
            method_limit = int(self.options["rank"]) or self._default_rank(terms)
        return min((limit for limit in (method_limit, self.max_rank) if limit is not None), default=None)

    def _default_rank(self, terms: Sequence[WeightedUpdate]) -> int:
        if self.method.default_rank == "max":
            return max(self.adapters[name].rank for name in self.recipe.weights)
        return sum(term.module.rank for term in terms) or 1


def bind(
    recipe: Recipe,
    adapters: Mapping[str, LoraAdapter],
    max_rank: int | None,
    device: Device,
    *,
    same_base: bool = False,
) -> BoundRecipe:
    """Check that everything the recipe names is there and fits together; raises as `fuse`."""
    recipe, on_answer = _take_phase(recipe)
    for name in recipe.adapters:
        if name not in adapters:
            raise UnknownAdapterError(name, adapters)
    if max_rank is not None and (isinstance(max_rank, bool) or not isinstance(max_rank, int) or max_rank < 1):
        raise FusionError(f"max_rank is {max_rank!r}: expected a whole number ≥ 1, or None for no limit")
    used = {name: adapters[name] for name in recipe.adapters}
    if (gate := next((name for name, adapter in used.items() if adapter.gate is not None), None)) is not None:
        raise FusionError(f"{gate!r} is a gate, not an adapter to be fused: name it in 'gate(…, by={name_text(gate)})'")
    check_together(used, same_base=same_base)
    recipe.check_ranks({name: adapter.rank for name, adapter in used.items()})
    nonzero = [name for name, weight in recipe.weights.items() if weight != 0.0]
    shapes: dict[str, tuple[int, int]] = {}
    for name in nonzero or recipe.weights:
        shapes.update(used[name].shapes)
    method = METHODS[recipe.method]
    options = method.fill(dict(recipe.options))
    layers = layer_range(key for adapter in used.values() for key in adapter.shapes)
    dtype = reduce(torch.promote_types, (adapter.dtype for adapter in used.values()))
    on_answer = on_answer or acts_on_answer(recipe, used)
    ordered = dict(sorted(shapes.items()))
    return BoundRecipe(
        recipe, recipe.weights, used, method, options, ordered, layers, max_rank, device, dtype, on_answer
    )


def acts_on_answer(recipe: Recipe, adapters: Mapping[str, LoraAdapter]) -> bool:
    """Whether all adapters that the recipe lets act do so on the answer alone."""
    acting = [name for name, weight in recipe.weights.items() if weight != 0.0]
    return bool(acting) and all(adapters[name].answer_only for name in (*acting, *recipe.roles.values()))


def _take_phase(recipe: Recipe) -> tuple[Recipe, bool]:
    """The recipe of the only phase, and whether it is that of all the answer, but not of the prompt, where nothing has
    a weight; FusionError when weights differ otherwise between prompts or positions.
    """
    if recipe.gate is None:
        (_, first), *later = recipe.phases()
        if not later:
            return first, False
        if len(later) == 1 and later[0][0] == 0 and not any(map(any, map(list_numbers, first.weights.values()))):
            return later[0][1], True
    raise no_adapter(recipe)


def no_adapter(recipe: Recipe) -> FusionError:
    """The error for a recipe whose weights differ between prompts or positions."""
    if recipe.gate is not None:
        return FusionError(
            f"the gate {recipe.gate.by!r} chooses weights for each prompt, so no single adapter is this recipe: serve "
            f"it, or fuse its default, {quote(recipe.choose({}).format())}"
        )
    _, *later = recipe.phases()
    start, last = later[-1]
    return FusionError(
        f"the weights change with position, the last time at token {start} of the answer, so no single "
        f"adapter is this recipe: serve it, or fuse one phase, such as the last, {quote(last.format())}"
    )


def _scale(factors: LoraModule, weight: Components) -> LoraModule:
    """The factors with each row of A at its component's weight, in float32 or better."""
    numbers = torch.tensor(weight.numbers[: factors.rank], dtype=torch.float64, device=factors.a.device)
    a = (factors.a.to(torch.float64) * numbers[:, None]).to(factors.compute_dtype)
    return replace(factors, a=a)
