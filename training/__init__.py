"""LoRA fine-tuning: recipes, data sets, the trainer, and the default base.

    config, warnings = load_recipe("safety", ["train.max_steps=10"])
    start(config, Path("runs/safety"))
    export(Path("runs/safety"), Path("my-adapter"))

`import training` is cheap: every name is imported when first asked for.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.base_model import load_tokenizer
    from training.builtin.base import make_base
    from training.builtin.orders import draw_orders
    from training.config import Config, DataConfig, LoraConfig, ModelConfig, PolicyConfig, TrainConfig
    from training.convert import export, merge
    from training.errors import ConfigError, NonFiniteLossError
    from training.loop.fit import Progress
    from training.recipe import load_recipe
    from training.registration import register
    from training.rows.dataset import Dataset, build_dataset
    from training.rows.readers import Chat, read_chats
    from training.run import resume, start
else:
    _HOMES = {
        "base_model": ("load_tokenizer",),
        "builtin.base": ("make_base",),
        "builtin.orders": ("draw_orders",),
        "config": ("Config", "DataConfig", "LoraConfig", "ModelConfig", "PolicyConfig", "TrainConfig"),
        "convert": ("export", "merge"),
        "errors": ("ConfigError", "NonFiniteLossError"),
        "loop.fit": ("Progress",),
        "recipe": ("load_recipe",),
        "registration": ("register",),
        "rows.dataset": ("Dataset", "build_dataset"),
        "rows.readers": ("Chat", "read_chats"),
        "run": ("resume", "start"),
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
    "Chat",
    "Config",
    "ConfigError",
    "DataConfig",
    "Dataset",
    "LoraConfig",
    "ModelConfig",
    "NonFiniteLossError",
    "PolicyConfig",
    "Progress",
    "TrainConfig",
    "build_dataset",
    "draw_orders",
    "export",
    "load_recipe",
    "load_tokenizer",
    "make_base",
    "merge",
    "read_chats",
    "register",
    "resume",
    "start",
]
