"""Fusion algebra of LoRA adapters, the recipe language, adapter files and the store. No HTTP, no vLLM.

task, safety = load("runs/task"), load("runs/safety")
fused, report = fuse(parse("0.6*task + 0.4*safety"), {"task": task, "safety": safety})
save(fused, "fused")
"""

from adapters.adapter import LoraAdapter, LoraModule, check_together, make_adapter
from adapters.algebra.diff import Difference, ModuleDifference, diff
from adapters.algebra.fuse import fuse, plan
from adapters.algebra.rank import smallest_rank
from adapters.algebra.report import FusionReport, ModuleReport
from adapters.algebra.stack import Stack, stack, stack_rank
from adapters.errors import AdapterError, FusionError, LossError, RecipeError, UnknownAdapterError, did_you_mean
from adapters.files.io import load, save
from adapters.files.store import Entry, Store
from adapters.recipes.methods import METHODS, RESERVED_METHODS, Method, Option
from adapters.recipes.recipe import (
    NAME_PATTERN,
    RESERVED_NAMES,
    Recipe,
    Term,
    check_name,
    from_json,
    fusion_digest,
    parse,
)
from adapters.recipes.weights import ByModule, Ramp

__all__ = [
    "METHODS",
    "NAME_PATTERN",
    "RESERVED_METHODS",
    "RESERVED_NAMES",
    "AdapterError",
    "ByModule",
    "Difference",
    "Entry",
    "FusionError",
    "FusionReport",
    "LoraAdapter",
    "LoraModule",
    "LossError",
    "Method",
    "ModuleDifference",
    "ModuleReport",
    "Option",
    "Ramp",
    "Recipe",
    "RecipeError",
    "Stack",
    "Store",
    "Term",
    "UnknownAdapterError",
    "check_name",
    "check_together",
    "did_you_mean",
    "diff",
    "from_json",
    "fuse",
    "fusion_digest",
    "load",
    "make_adapter",
    "parse",
    "plan",
    "save",
    "smallest_rank",
    "stack",
    "stack_rank",
]
