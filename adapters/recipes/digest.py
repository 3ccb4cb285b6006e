"""The digest of a fusion: what identifies its result, whatever its adapters are called."""

import hashlib
import json
from collections.abc import Mapping

from adapters.errors import UnknownAdapterError
from adapters.recipes.methods import METHODS
from adapters.recipes.recipe import Recipe
from adapters.recipes.weights import number_text, weight_text


def fusion_digest(recipe: Recipe, *, base: str, parents: Mapping[str, str]) -> str:
    """sha256 hex over base, adapters' contents, weights, method, options and method version, and over the gate.

    `parents` maps the names of `recipe.parents` to their content digests (further names are ignored). Names are
    replaced by digests, so renaming an adapter changes nothing. UnknownAdapterError when a digest is missing.
    """
    for name in recipe.parents:
        if name not in parents:
            raise UnknownAdapterError(name, parents)
    method = METHODS[recipe.method]
    weights = {term.adapter: weight_text(term.weight) for term in recipe.terms}
    options: dict[str, object] = {}
    for name, value in method.fill(dict(recipe.options)).items():
        digest = parents[str(value)] if method.kinds[name] in ("adapter", "term") else value
        # Two terms may hold the same content: which one is meant shows in its weight.
        options[name] = [digest, weights[str(value)]] if method.kinds[name] == "term" else digest
    content: dict[str, object] = {
        "base": base,
        "method": [method.name, method.version],
        "options": options,
        "parents": sorted(parents[name] for name in recipe.parents),
        "terms": sorted([parents[term.adapter], weight_text(term.weight)] for term in recipe.terms),
    }
    if recipe.answer:
        content["answer"] = True
    if (gate := recipe.gate) is not None:
        bounds = sorted([parents[name], weights[name], *map(number_text, span)] for name, span in gate.bounds)
        content["gate"] = [parents[gate.by], bounds]
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
