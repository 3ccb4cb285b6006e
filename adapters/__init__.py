"""Fusion algebra of LoRA adapters, the recipe language, adapter files and the store. No HTTP, no vLLM.

    task, safety = load("runs/task"), load("runs/safety")
    fused, report = fuse(parse("0.6*task + 0.4*safety"), {"task": task, "safety": safety})
    save(fused, "fused")

Recipes and errors need no torch; everything else brings it, and is imported when first asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
