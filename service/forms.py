"""Other forms of names, for routers that know a replica's models by their exact names only."""

import re
from collections.abc import Collection

FORMS = ("versions", "aliases", "publishers/NAMESPACE")
"""What `FUSION_MODEL_FORMS` may have: `profile@3` for each version, `base:name` for adapters and profiles,
`publishers/NAMESPACE/models/name` for all.
"""
_PUBLISHER = re.compile(r"publishers/[A-Za-z0-9._-]+")
_PUBLISHED = re.compile(_PUBLISHER.pattern + "/models/(.+)")


def is_form(text: str) -> bool:
    """Whether `FUSION_MODEL_FORMS` may have it."""
    return text in FORMS[:2] or _PUBLISHER.fullmatch(text) is not None


def list_forms(base: str, name: str, forms: Collection[str]) -> tuple[str, ...]:
    """The name, and the other forms of it that are listed; those of versions are names of their own."""
    aliases = [f"{base}:{name}"] if "aliases" in forms and name != base else []
    return name, *aliases, *(f"{form}/models/{name}" for form in forms if _PUBLISHER.fullmatch(form))


def plain_name(base: str, text: str) -> str:
    """The name without its form, as Ray Serve and others spell an adapter (`base:name`), or KServe and others a model
    (`publishers/NAMESPACE/models/name`).
    """
    published = _PUBLISHED.fullmatch(text)
    return published[1] if published else text.removeprefix(f"{base}:")
