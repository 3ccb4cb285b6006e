"""What adapters, profiles and bases may be called."""

import re

from adapters.errors import RecipeError, quote
from adapters.recipes.methods import METHODS

NAME_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")

RESERVED_METHODS: tuple[str, ...] = tuple(
    sorted(
        {
            *METHODS,
            *("linear", "cat", "dare", "della_linear", "breadcrumbs_ties", "knots_ties", "karcher", "ramp"),
            *("task_arithmetic", "model_stock", "fisher", "regmean", "lorahub"),
            *("safe_lora", "schedule", "layers", "della_ties", "emr", "iso_c", "tsv", "nuslerp", "sce"),
            "peft_cat",
        }
    )
)
"""Names of methods and schedules, present and planned: no adapter or profile may have one."""

RESERVED_NAMES = frozenset({*RESERVED_METHODS, "plan", "text", "image", "audio", "video", "input"})


def check_name(name: str, position: int | None = None) -> str:
    """Return `name` if an adapter, profile or base may be called that; RecipeError otherwise."""
    if not isinstance(name, str) or NAME_PATTERN.fullmatch(name) is None:
        raise RecipeError(
            f"{quote(name)} is not a valid name: expected a letter, then up to 63 letters, digits, '.', '_' or '-'",
            position,
        )
    if name in RESERVED_NAMES:
        raise RecipeError(f"the name {name!r} is reserved: choose another name", position)
    return name
