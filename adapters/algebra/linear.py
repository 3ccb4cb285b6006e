"""Linear recipes: in every module, the result is a weighted sum of the recipe's adapters as they are.

Such a recipe needs no factors of its own: a table of weights, module by adapter, says all of it. That holds for plain
sums, for weights that are functions, and for methods whose row says `linear`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapters.adapter import LoraAdapter
from adapters.algebra.bound import BoundRecipe, bind, no_adapter
from adapters.algebra.combine import COMBINE
from adapters.recipes import Components, Recipe


@dataclass(frozen=True, slots=True, eq=False)
class WeightTable:
    """What each adapter counts in each module: `weights` is float64 [modules, adapters], zero where an adapter lacks
    the module or does not act. The modules are those of all the recipe's adapters, sorted, so that the tables of its
    phases have the same rows and columns.
    """

    modules: tuple[str, ...]
    adapters: tuple[str, ...]
    weights: Tensor
    components: Mapping[str, tuple[float, ...]]
    """By adapter, one further factor for each of its rank components, in all modules alike; 1 for other adapters."""

    def at(self, module: str) -> dict[str, float]:
        """The weights other than zero in one module, by adapter."""
        row: list[float] = self.weights[self.modules.index(module)].tolist()
        return {name: weight for name, weight in zip(self.adapters, row, strict=True) if weight != 0.0}


def tabulate(recipe: Recipe, adapters: Mapping[str, LoraAdapter], *, same_base: bool = False) -> WeightTable:
    """The weights of a linear recipe over its terms and the adapters of its roles, module by module.

    A sum needs the adapters' `facts` only, a method also their factors. Raises what `fuse` raises for the same recipe;
    one whose weights change with position, `answer(…)` too, is tabulated phase by phase. ValueError when it is not
    linear.
    """
    if not recipe.is_linear:
        raise ValueError(f"the method {recipe.method!r} is not linear: {recipe.format()!r:.100} has no weight table")
    if not recipe.is_constant:
        raise no_adapter(recipe)
    bound = bind(recipe, adapters, None, None, same_base=same_base)
    names = tuple(bound.adapters)
    modules = tuple(sorted({module for adapter in bound.adapters.values() for module in adapter.facts}))
    weights = np.zeros((len(modules), len(names)))
    rows = {module: row for row, module in enumerate(modules)}
    if bound.method.combine == "sum":
        for column, (name, adapter) in enumerate(bound.adapters.items()):
            stated = bound.weigh(name, [module for module in adapter.facts if module in bound.shapes])
            for module, weight in stated.items():
                weights[rows[module], column] = weight
    else:
        for module in bound.shapes:
            for name, weight in _list_combined(bound, module):
                weights[rows[module], names.index(name)] += weight
    components = {t.adapter: t.weight.numbers for t in bound.recipe.terms if isinstance(t.weight, Components)}
    return WeightTable(modules, names, torch.from_numpy(weights), components)


def _list_combined(bound: BoundRecipe, module: str) -> Iterator[tuple[str, float]]:
    parents = bound.parents(module)
    names = {id(parent.module): parent.name for parent in parents}
    terms = COMBINE[bound.method.combine](bound.nonzero_terms(parents), bound.context(module, parents))
    return ((names[id(factors)], weight) for weight, factors in terms)
