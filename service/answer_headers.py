"""What the headers of an answer, and events of the key-value cache, say of its fusion."""

from typing import Any
from urllib.parse import quote

from adapters.recipes import NAME_PATTERN
from service.pool import Lease
from service.resolve import Fusion
from service.tenants import join_key

MAX_RECIPE_HEADER = 2048
"""Bytes; a longer recipe is left out of the headers."""


def fusion_headers(fusion: Fusion, stack: str, lease: Lease | None) -> list[tuple[bytes, bytes]]:
    """The `x-fusion-*` headers of an answer, the recipe percent-encoded; `stack` is what routers keep it together by.

    Without a lease nothing was computed.
    """
    recipe = quote(fusion.recipe.format(), safe="*+(),=@ ")
    pairs = {"x-fusion-digest": fusion.digest, "x-fusion-stack": stack}
    if lease is not None:
        pairs |= {
            "x-fusion-mode": lease.mode,
            "x-fusion-source": lease.source,
            "x-fusion-rank": str(lease.rank),
            "x-fusion-error": f"{lease.resident.error:.3g}",
        }
    if len(recipe) <= MAX_RECIPE_HEADER:
        pairs["x-fusion-recipe"] = recipe
    return [(key.encode(), value.encode()) for key, value in pairs.items()]


def public_name(fusion: Fusion, sent: Any) -> str:
    """What events of the key-value cache call a request: the name that it `sent`, else the recipe's canonical text,
    with commas percent-encoded, which parsers split at; the digest of a text that is longer than any name. What a
    tenant calls its own has the tenant before it.
    """
    if isinstance(sent, str) and NAME_PATTERN.fullmatch(sent):
        return join_key(fusion.tenant, sent)
    text = fusion.recipe.format().replace("%", "%25").replace(",", "%2C")
    return join_key(fusion.tenant, text) if len(text) <= MAX_RECIPE_HEADER else fusion.digest
