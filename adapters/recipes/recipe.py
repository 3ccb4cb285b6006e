"""The recipe: an expression over adapters, frozen, canonical, hashable."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from adapters.errors import RecipeError, UnknownAdapterError, quote
from adapters.recipes.checks import check_arity
from adapters.recipes.gates import Gate
from adapters.recipes.method import Value
from adapters.recipes.methods import DEFAULT_METHOD, METHODS
from adapters.recipes.names import check_name, name_text
from adapters.recipes.weights import (
    PROMPT,
    Components,
    Weight,
    count_levels,
    freeze,
    list_numbers,
    list_starts,
    number_text,
    simplify,
    weight_json,
    weight_text,
)


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter and its weight: a number, or a function of layer, module, component or position."""

    adapter: str
    weight: Weight


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which adapters, how much, where, by which method. Build it with `parse` or `from_json`, which check it.

    The constructor puts it into canonical order: terms and options sorted, options at their default left out,
    weights in their simplest form, no negative zero.
    """

    method: str
    terms: tuple[Term, ...]
    options: tuple[tuple[str, Value], ...] = ()
    answer: bool = False
    """Whether all weights are 0 in the prompt."""
    gate: Gate | None = None
    """What chooses weights for each prompt; `terms` then has the weights that are used when it fails."""

    def __post_init__(self) -> None:
        simple = (Term(term.adapter, simplify(term.weight, answer=self.answer)) for term in self.terms)
        terms = sorted(simple, key=lambda term: term.adapter)
        defaults = {option.name: option.default for option in METHODS[self.method].options}
        options = sorted((name, value) for name, value in self.options if value != defaults[name])
        object.__setattr__(self, "terms", tuple(terms))
        object.__setattr__(self, "options", tuple(options))

    @classmethod
    def single(cls, adapter: str) -> "Recipe":
        """The recipe of one adapter alone, at weight 1."""
        return cls(DEFAULT_METHOD, (Term(adapter, 1.0),))

    @property
    def roles(self) -> dict[str, str]:
        """Adapters that are not terms, by the option that names them."""
        kinds = METHODS[self.method].kinds
        return {name: str(value) for name, value in self.options if kinds[name] == "adapter"}

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of all its adapters, sorted: terms, and those that play a role."""
        return tuple(sorted({*(term.adapter for term in self.terms), *self.roles.values()}))

    @property
    def parents(self) -> tuple[str, ...]:
        """The names of everything its result depends on, sorted: the adapters, and the gate."""
        return self.adapters if self.gate is None else tuple(sorted((*self.adapters, self.gate.by)))

    @property
    def weights(self) -> dict[str, Weight]:
        """Weight of each term by adapter name."""
        return {term.adapter: term.weight for term in self.terms}

    @property
    def is_sum(self) -> bool:
        """Whether this is the plain, exact sum: one number per adapter, and no method."""
        is_plain = self.method == DEFAULT_METHOD and not self.answer and self.gate is None
        return is_plain and all(isinstance(term.weight, float) for term in self.terms)

    @property
    def is_linear(self) -> bool:
        """Whether the result is, module by module, a weighted sum of the adapters: sums, schedules, some methods."""
        return METHODS[self.method].linear

    @property
    def is_constant(self) -> bool:
        """Whether all tokens of all prompts have the same weights, so that the recipe is one adapter."""
        return self.gate is None and len(self._starts()) == 1

    def _starts(self) -> tuple[int, ...]:
        return list_starts([term.weight for term in self.terms], answer=self.answer)

    def magnitudes(self) -> dict[str, float]:
        """The largest magnitude of each term's weight, by adapter, in whatever module, position and prompt."""
        bounds = dict(self.gate.bounds) if self.gate is not None else {}
        return {
            term.adapter: max(map(abs, (*list_numbers(term.weight), *bounds.get(term.adapter, ()))))
            for term in self.terms
        }

    def phases(self) -> tuple[tuple[int, "Recipe"], ...]:
        """Where each phase begins (PROMPT, then tokens of the answer from 0 on), and the recipe that holds in it.

        Those recipes have the same adapters, method and options as this one, and no function of the position. There is
        one when the weights do not change, and at most MAX_PHASES. ValueError for a recipe with a gate: `choose` first.
        """
        if self.gate is not None:
            raise ValueError(f"{self.format()!r:.100} has a gate: choose its weights first")
        if self.is_sum:
            return ((PROMPT, self),)
        levels = count_levels(answer=self.answer)

        def weigh(start: int, weight: Weight) -> Weight:
            return 0.0 if self.answer and start == PROMPT else freeze(weight, start, levels)

        def recipe_from(start: int) -> Recipe:
            return Recipe(self.method, tuple(Term(t.adapter, weigh(start, t.weight)) for t in self.terms), self.options)

        return tuple((start, recipe_from(start)) for start in self._starts())

    def choose(self, weights: Mapping[str, float]) -> "Recipe":
        """The recipe without its gate, at the weights that it chose, each moved inside its bounds; adapters that are
        not in `weights` keep their stated ones, so `choose({})` is the default.

        RecipeError for an adapter without bounds, and for NaN.
        """
        bounds = dict(self.gate.bounds) if self.gate is not None else {}
        for name, weight in weights.items():
            if name not in bounds:
                raise RecipeError(f"{quote(self.format())} has no bounds for {quote(name)}, so no weight can be chosen")
            if math.isnan(weight):
                raise RecipeError(f"the weight chosen for {name!r} is not a number: expected one within {bounds[name]}")
        chosen = {name: min(max(float(weight), bounds[name][0]), bounds[name][1]) for name, weight in weights.items()}
        terms = tuple(Term(term.adapter, chosen.get(term.adapter, term.weight)) for term in self.terms)
        return replace(self, terms=terms, gate=None)

    def check_ranks(self, ranks: Mapping[str, int]) -> None:
        """RecipeError unless every adapter with weights by component has as many as its rank in `ranks`, by name."""
        for term in self.terms:
            if isinstance(term.weight, Components) and len(term.weight.numbers) != ranks[term.adapter]:
                raise RecipeError(
                    f"{term.adapter!r} has {len(term.weight.numbers)} weights by component, but rank "
                    f"{ranks[term.adapter]}: expected one for each component"
                )

    def without(self, adapter: str) -> "Recipe":
        """The recipe with one adapter left out, the other weights as they are.

        Without the adapter of a role, the plain sum of the terms remains, on which the role acted; without the gate,
        its default. Raises UnknownAdapterError when the recipe does not name `adapter`, RecipeError when no valid
        recipe remains: its only term, or one of the two that `slerp` takes.
        """
        if adapter not in self.parents:
            raise UnknownAdapterError(adapter, self.parents)
        if self.gate is not None and adapter == self.gate.by:
            return self.choose({})
        if adapter in self.roles.values():
            return Recipe(DEFAULT_METHOD, self.terms, answer=self.answer)
        method = METHODS[self.method]
        terms = tuple(term for term in self.terms if term.adapter != adapter)
        options = {n: value for n, value in self.options if not (method.kinds[n] == "term" and value == adapter)}
        try:
            check_arity(method, options, len(terms), None)
        except RecipeError as error:
            raise RecipeError(f"{quote(self.format())} is not valid without {adapter!r}: {error}") from error
        gate = None if self.gate is None else self.gate.without(adapter)
        return replace(self, terms=terms, options=tuple(options.items()), gate=gate)

    def rename(self, names: Mapping[str, str]) -> "Recipe":
        """The recipe with other names, old → new, in terms, roles, options and gate; further names are ignored.

        All are exchanged at once, so two may swap. RecipeError when a new name is not valid, or two adapters would
        share one.
        """
        kinds = METHODS[self.method].kinds
        new = {name: check_name(names.get(name, name)) for name in self.parents}
        if len(set(new.values())) < len(new):
            raise RecipeError(f"{quote(self.format())} has adapters that would share a name: {quote(new)}")
        terms = tuple(Term(new[term.adapter], term.weight) for term in self.terms)
        named = ("term", "adapter")
        options = tuple((n, new[str(v)] if kinds[n] in named else v) for n, v in self.options)
        return replace(self, terms=terms, options=options, gate=self.gate and self.gate.rename(new))

    def format(self) -> str:
        """The canonical text; `parse` reads it back as the same recipe."""
        if len(self.terms) == 1 and self.terms[0].weight == 1.0:
            body = name_text(self.terms[0].adapter)
        else:
            body = " + ".join(f"{weight_text(term.weight)}*{name_text(term.adapter)}" for term in self.terms)
        if self.method != DEFAULT_METHOD:
            options = "".join(f", {name}={self._value_text(name, value)}" for name, value in self.options)
            body = f"{self.method}({body}{options})"
        body = f"answer({body})" if self.answer else body
        return body if self.gate is None else f"gate({body}, {self.gate})"

    def _value_text(self, option: str, value: Value) -> str:
        if METHODS[self.method].kinds[option] in ("adapter", "term"):
            return name_text(str(value))
        return number_text(value) if isinstance(value, float) else str(value)

    def __str__(self) -> str:
        return self.format()

    def to_json(self) -> dict[str, object]:
        """The JSON form; `from_json` reads it back."""
        terms = [{"name": term.adapter, "weight": weight_json(term.weight)} for term in self.terms]
        content: dict[str, object] = {"adapters": terms, "method": self.method, **dict(self.options)}
        if self.answer:
            content["answer"] = True
        if self.gate is not None:
            content["gate"] = self.gate.to_json()
        return content
