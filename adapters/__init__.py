"""Fusion algebra of LoRA adapters, the recipe language, adapter files and the store. No HTTP, no vLLM.

    task, safety = load("runs/task"), load("runs/safety")
    fused, report = fuse(parse("0.6*task + 0.4*safety"), {"task": task, "safety": safety})
    save(fused, "fused")

Recipes and errors need the standard library only; everything else brings torch, and is imported when first asked for.
"""

import importlib
from typing import TYPE_CHECKING

from adapters.errors import AdapterError, FusionError, LossError, RecipeError, UnknownAdapterError, did_you_mean
from adapters.recipes import (
    METHODS,
    NAME_PATTERN,
    RESERVED_METHODS,
    RESERVED_NAMES,
    ByModule,
    Method,
    Option,
    Ramp,
    Recipe,
    Term,
    check_name,
    from_json,
    fusion_digest,
    parse,
)

if TYPE_CHECKING:
    from adapters.adapter import LoraAdapter, LoraModule, check_together, make_adapter
    from adapters.algebra.diff import Difference, ModuleDifference, diff
    from adapters.algebra.fuse import fuse, plan
    from adapters.algebra.rank import smallest_rank
    from adapters.algebra.report import FusionReport, ModuleReport
    from adapters.algebra.stack import Stack, stack, stack_rank
    from adapters.files.config import PeftDetails
    from adapters.files.io import load, save
    from adapters.files.store import Entry, Store
else:
    _HOMES = {
        "adapter": ("LoraAdapter", "LoraModule", "check_together", "make_adapter"),
        "algebra.diff": ("Difference", "ModuleDifference", "diff"),
        "algebra.fuse": ("fuse", "plan"),
        "algebra.rank": ("smallest_rank",),
        "algebra.report": ("FusionReport", "ModuleReport"),
        "algebra.stack": ("Stack", "stack", "stack_rank"),
        "files.config": ("PeftDetails",),
        "files.io": ("load", "save"),
        "files.store": ("Entry", "Store"),
    }

    def __getattr__(name: str) -> object:
        for home, names in _HOMES.items():
            if name in names:
                value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


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
    "PeftDetails",
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
