"""What adapters, profiles and bases may be called."""

import re

from adapters.errors import RecipeError, quote
from adapters.recipes.methods import METHODS

PLAIN_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
"""Names that stand in a recipe as they are; all others in backquotes."""
NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@:-]*(?:/[A-Za-z0-9_][A-Za-z0-9._@:-]*)*")
"""No part between slashes is `.`, `..` or empty, so that a name keeps its form in a URL's path."""
MAX_NAME = 128
QUOTES = '`"'
"""What a name in a recipe may be put in; the canonical form has backquotes."""

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
    if not isinstance(name, str) or len(name) > MAX_NAME or NAME_PATTERN.fullmatch(name) is None:
        raise RecipeError(
            f"{quote(name)} is not a valid name: expected at most {MAX_NAME} letters, digits, '.', '_', '-', '@' or "
            "':', in parts that '/' joins and that start with a letter, a digit or '_'",
            position,
        )
    if name in RESERVED_NAMES:
        raise RecipeError(f"the name {name!r} is reserved: choose another name", position)
    return name


def name_text(name: str) -> str:
    """A name as the text of a recipe has it: in backquotes unless it is plain."""
    return name if PLAIN_PATTERN.fullmatch(name) else f"`{name}`"


def find_name(name: str, text: str) -> int | None:
    """Where the name stands in a recipe's text, by itself; None when it does not."""
    match = re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", text)
    return None if match is None else match.start()
