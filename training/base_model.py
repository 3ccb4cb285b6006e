"""The base model by name: where its folder is, what adapters call it, and its tokenizer."""

import os
from pathlib import Path
from typing import Any

from training.errors import ConfigError

BASES = Path(".cache/base")
"""Where `make setup` puts base models, by name."""


def resolve_base(name: str) -> str:
    """A folder as it is, a name in .cache/base as that folder, anything else as a name on the hub."""
    for path in (Path(name), BASES / name):
        if (path / "config.json").is_file():
            return str(path)
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/")):
        raise ConfigError(
            f"model.base is {name!r}: there is no model folder of that name, here or in {BASES}; "
            f"the default base is made with: python -m training.base {BASES}/smollm2-135m-instruct"
        )
    return name


def name_base(base: str) -> str:
    """What an adapter calls its base: the folder's name, or the name on the hub."""
    return os.path.basename(os.path.normpath(base)) if os.path.isdir(base) else base


def load_tokenizer(base: str) -> Any:
    """The base's tokenizer; its padding token is the end token if it has none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
