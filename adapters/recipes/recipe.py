"""The recipe: an expression over adapters, frozen, canonical, hashable. `parse(format(r)) == r`.

recipe = sum | METHOD "(" sum { "," option } ")"
sum    = term { "+" term }
term   = [ weight "*" ] NAME
weight = NUMBER | "ramp" "(" NUMBER ".." NUMBER ")" | "{" PATTERN ":" NUMBER { "," PATTERN ":" NUMBER } "}"
option = NAME "=" ( NUMBER | NAME )
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from adapters.errors import RecipeError, UnknownAdapterError, quoted
from adapters.recipes.methods import DEFAULT_METHOD, METHODS, RESERVED_METHODS, Value
from adapters.recipes.weights import Weight, number_text, weight_json, weight_text

MAX_TEXT = 8192
MAX_TERMS = 64
MAX_WEIGHT = 16.0
NAME_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
RESERVED_NAMES = frozenset({*RESERVED_METHODS, "plan", "text", "image", "audio", "video", "input"})


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
        terms = sorted((Term(t.adapter, _plain(t.weight)) for t in self.terms), key=lambda term: term.adapter)
        defaults = {option.name: option.default for option in METHODS[self.method].options}
        kept = sorted((name, value) for name, value in self.options if value != defaults[name])
        object.__setattr__(self, "terms", tuple(terms))
        object.__setattr__(self, "options", tuple(kept))

    @property
    def roles(self) -> dict[str, str]:
        """Adapters that are no terms, by the option that names them."""
        kinds = {option.name: option.kind for option in METHODS[self.method].options}
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

    def format(self) -> str:
        """The canonical text."""
        if len(self.terms) == 1 and self.terms[0].weight == 1.0:
            body = self.terms[0].adapter
        else:
            body = " + ".join(f"{weight_text(term.weight)}*{term.adapter}" for term in self.terms)
        if self.method == DEFAULT_METHOD:
            return body
        options = "".join(f", {name}={_value_text(value)}" for name, value in self.options)
        return f"{self.method}({body}{options})"

    def __str__(self) -> str:
        return self.format()

    def to_json(self) -> dict[str, object]:
        """The JSON form; `from_json` reads it back."""
        terms = [{"name": term.adapter, "weight": weight_json(term.weight)} for term in self.terms]
        return {"adapters": terms, "method": self.method, **dict(self.options)}


def _plain(weight: Weight) -> Weight:
    """Numbers as floats without negative zero."""
    return float(weight) + 0.0 if isinstance(weight, int | float) else weight


def _value_text(value: Value) -> str:
    return number_text(value) if isinstance(value, float) else str(value)


def check_name(name: str, position: int | None = None) -> str:
    """Return `name` if an adapter, profile or base may be called so; RecipeError otherwise."""
    if not isinstance(name, str) or NAME_PATTERN.fullmatch(name) is None:
        raise RecipeError(
            f"{quoted(name)} is not a name: expected a letter, then up to 63 of letters, digits, '.', '_', '-'",
            position,
        )
    if name in RESERVED_NAMES:
        raise RecipeError(f"the name {name!r} is reserved: choose another name for the adapter", position)
    return name


def parse(text: str, *, max_weight: float = MAX_WEIGHT) -> Recipe:
    """Read a recipe's text. RecipeError, with the position, for anything outside the grammar or the
    bounds.
    """
    from adapters.recipes.grammar import Parser

    return Parser(text, max_weight).recipe()


def from_json(obj: object, *, max_weight: float = MAX_WEIGHT) -> Recipe:
    """Read the JSON form `{"adapters": [{"name", "weight"}, …], "method": …, option: …}`;
    RecipeError if wrong.
    """
    from adapters.recipes.json_form import read_json

    return read_json(obj, max_weight)


def fusion_digest(recipe: Recipe, *, base: str, parents: Mapping[str, str]) -> str:
    """sha256 hex of what the fusion is: base, adapters' contents, weights, method, options and
    method version.

    `parents` maps the recipe's adapter names to their content digests (more names are ignored).
    Names are replaced by digests, so renaming an adapter changes nothing. UnknownAdapterError when
    a digest is missing.
    """
    for name in recipe.adapters:
        if name not in parents:
            raise UnknownAdapterError(name, parents)
    method = METHODS[recipe.method]
    kinds = {option.name: option.kind for option in method.options}
    weights = {term.adapter: weight_text(term.weight) for term in recipe.terms}
    options: dict[str, object] = {}
    for name, value in method.filled(dict(recipe.options)).items():
        digest = parents[str(value)] if kinds[name] in ("adapter", "term") else value
        # Two terms may hold the same content: which one is meant shows in its weight.
        options[name] = [digest, weights[str(value)]] if kinds[name] == "term" else digest
    content = {
        "base": base,
        "method": [method.name, method.version],
        "options": options,
        "parents": sorted(parents[name] for name in recipe.adapters),
        "terms": sorted([parents[term.adapter], weight_text(term.weight)] for term in recipe.terms),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
