"""The recipe: an expression over adapters, frozen, canonical, hashable."""

from collections.abc import Mapping
from dataclasses import dataclass

from adapters.errors import RecipeError, UnknownAdapterError, quote
from adapters.recipes.checks import check_arity
from adapters.recipes.method import Value
from adapters.recipes.methods import DEFAULT_METHOD, METHODS
from adapters.recipes.names import check_name, name_text
from adapters.recipes.weights import Weight, number_text, weight_json, weight_text


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter and its weight: a number, or a schedule over layers or modules."""

    adapter: str
    weight: Weight


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which adapters, how much, by which method. Build it with `parse` or `from_json`, which check it.

    The constructor puts it into canonical order: terms and options sorted, options at their default left out,
    no negative zero.
    """

    method: str
    terms: tuple[Term, ...]
    options: tuple[tuple[str, Value], ...] = ()

    def __post_init__(self) -> None:
        terms = sorted((Term(t.adapter, _normalize(t.weight)) for t in self.terms), key=lambda term: term.adapter)
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
    def weights(self) -> dict[str, Weight]:
        """Weight of each term by adapter name."""
        return {term.adapter: term.weight for term in self.terms}

    @property
    def is_sum(self) -> bool:
        """Whether this is the plain, exact sum: one number per adapter, and no method."""
        return self.method == DEFAULT_METHOD and all(isinstance(term.weight, float) for term in self.terms)

    def without(self, adapter: str) -> "Recipe":
        """The recipe with one adapter left out, the other weights as they are.

        Without the adapter of a role, the plain sum of the terms remains, on which the role acted. Raises
        UnknownAdapterError when the recipe does not name `adapter`, RecipeError when no valid recipe remains: its
        only term, or one of the two that `slerp` takes.
        """
        if adapter not in self.adapters:
            raise UnknownAdapterError(adapter, self.adapters)
        if adapter in self.roles.values():
            return Recipe(DEFAULT_METHOD, self.terms)
        method = METHODS[self.method]
        terms = tuple(term for term in self.terms if term.adapter != adapter)
        options = {n: value for n, value in self.options if not (method.kinds[n] == "term" and value == adapter)}
        try:
            check_arity(method, options, len(terms), None)
        except RecipeError as error:
            raise RecipeError(f"{quote(self.format())} is not valid without {adapter!r}: {error}") from error
        return Recipe(self.method, terms, tuple(options.items()))

    def rename(self, names: Mapping[str, str]) -> "Recipe":
        """The recipe with other adapter names, old → new, in terms, roles and options; further names are ignored.

        All are exchanged at once, so two may swap. RecipeError when a new name is not valid, or two adapters would
        share one.
        """
        kinds = METHODS[self.method].kinds
        new = {name: check_name(names.get(name, name)) for name in self.adapters}
        if len(set(new.values())) < len(new):
            raise RecipeError(f"{quote(self.format())} has adapters that would share a name: {quote(new)}")
        terms = tuple(Term(new[term.adapter], term.weight) for term in self.terms)
        named = ("term", "adapter")
        return Recipe(self.method, terms, tuple((n, new[str(v)] if kinds[n] in named else v) for n, v in self.options))

    def format(self) -> str:
        """The canonical text; `parse` reads it back as the same recipe."""
        if len(self.terms) == 1 and self.terms[0].weight == 1.0:
            body = name_text(self.terms[0].adapter)
        else:
            body = " + ".join(f"{weight_text(term.weight)}*{name_text(term.adapter)}" for term in self.terms)
        if self.method == DEFAULT_METHOD:
            return body
        options = "".join(f", {name}={self._value_text(name, value)}" for name, value in self.options)
        return f"{self.method}({body}{options})"

    def _value_text(self, option: str, value: Value) -> str:
        if METHODS[self.method].kinds[option] in ("adapter", "term"):
            return name_text(str(value))
        return number_text(value) if isinstance(value, float) else str(value)

    def __str__(self) -> str:
        return self.format()

    def to_json(self) -> dict[str, object]:
        """The JSON form; `from_json` reads it back."""
        terms = [{"name": term.adapter, "weight": weight_json(term.weight)} for term in self.terms]
        return {"adapters": terms, "method": self.method, **dict(self.options)}


def _normalize(weight: Weight) -> Weight:
    """Numbers as floats without negative zero."""
    return float(weight) + 0.0 if isinstance(weight, int | float) else weight
