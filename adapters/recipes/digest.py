"""The digest of a fusion: what identifies its result, whatever its adapters are called."""

import hashlib
import json
from collections.abc import Mapping

from adapters.errors import UnknownAdapterError
from adapters.recipes.methods import METHODS
from adapters.recipes.recipe import Recipe
from adapters.recipes.weights import weight_text


def fusion_digest(recipe: Recipe, *, base: str, parents: Mapping[str, str]) -> str:
    """sha256 hex over base, adapters' contents, weights, method, options and method version.

    `parents` maps the recipe's adapter names to their content digests (further names are ignored). Names are
    replaced by digests, so renaming an adapter changes nothing. UnknownAdapterError when a digest is missing.
    """
    for name in recipe.adapters:
        if name not in parents:
            raise UnknownAdapterError(name, parents)
    method = METHODS[recipe.method]
    weights = {term.adapter: weight_text(term.weight) for term in recipe.terms}
    options: dict[str, object] = {}
    for name, value in method.filled(dict(recipe.options)).items():
        digest = parents[str(value)] if method.kinds[name] in ("adapter", "term") else value
        # Two terms may hold the same content: which one is meant shows in its weight.
        options[name] = [digest, weights[str(value)]] if method.kinds[name] == "term" else digest
    content = {
        "base": base,
        "method": [method.name, method.version],
        "options": options,
        "parents": sorted(parents[name] for name in recipe.adapters),
        "terms": sorted([parents[term.adapter], weight_text(term.weight)] for term in recipe.terms),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
