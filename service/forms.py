"""Other forms of names, for routers that know a replica's models by their exact names only."""

FORMS = ("versions", "aliases")
"""What `FUSION_MODEL_FORMS` may have: `profile@3` for each version, `base:name` for adapters and profiles."""


def alias(base: str, name: str) -> str:
    """The name with its base before it, as Ray Serve and others spell an adapter."""
    return f"{base}:{name}"
