"""LoRA fine-tuning: recipes, data sets, the trainer, and the default base.

    config, warnings = load_recipe("safety", ["train.max_steps=10"])
    start(config, Path("runs/safety"))
    export(Path("runs/safety"), Path("my-adapter"))

`import training` is cheap: every name is imported when first asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
