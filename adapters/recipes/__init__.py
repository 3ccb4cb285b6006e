"""The recipe language: what to fuse, by which method, at which weights. Needs no torch.

recipe = parse("ties(0.6*task + 0.4*safety, density=0.5)")
recipe.without("safety").format()  # 'ties(0.6*task, density=0.5)' in canonical form
"""

from adapters.errors import FusionError, RecipeError, UnknownAdapterError, did_you_mean
from adapters.recipes.answers import check_prompt
from adapters.recipes.digest import fusion_digest
from adapters.recipes.gates import Gate
from adapters.recipes.grammar import parse
from adapters.recipes.json_form import from_json
from adapters.recipes.method import Method, Option
from adapters.recipes.methods import METHODS
from adapters.recipes.names import (
    MAX_NAME,
    NAME_PATTERN,
    RESERVED_METHODS,
    RESERVED_NAMES,
    check_name,
    find_name,
    name_text,
)
from adapters.recipes.recipe import Recipe, Term
from adapters.recipes.weights import MAX_PHASES, PROMPT, ByModule, Components, Fade, Ramp, Steps, list_parts

__all__ = [
    "MAX_NAME",
    "MAX_PHASES",
    "METHODS",
    "NAME_PATTERN",
    "PROMPT",
    "RESERVED_METHODS",
    "RESERVED_NAMES",
    "ByModule",
    "Components",
    "Fade",
    "FusionError",
    "Gate",
    "Method",
    "Option",
    "Ramp",
    "Recipe",
    "RecipeError",
    "Steps",
    "Term",
    "UnknownAdapterError",
    "check_name",
    "check_prompt",
    "did_you_mean",
    "find_name",
    "from_json",
    "fusion_digest",
    "list_parts",
    "name_text",
    "parse",
]
