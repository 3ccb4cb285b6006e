"""Fusion algebra of LoRA adapters, the recipe language, adapter files and the store. No HTTP, no vLLM.

>>> from adapters import fuse, load, parse, save
>>> fused, report = fuse(parse("0.6*task + 0.4*safety"), {"task": load(…), "safety": load(…)})
>>> save(fused, "fused")
"""

from .adapter import LoraAdapter, LoraModule, check_together, make_adapter
from .errors import AdapterError, FusionError, LossError, RecipeError, UnknownAdapterError
from .fuse import fuse, plan
from .io import load, save
from .methods import METHODS, RESERVED_METHODS, Method, Option
from .recipe import (
    NAME_PATTERN,
    RESERVED_NAMES,
    Recipe,
    Term,
    check_name,
    from_json,
    fusion_digest,
    parse,
)
from .stack import Stack, stack, stack_rank
from .store import Entry, Store
