"""The base model by name: where its folder is, what adapters call it, and its tokenizer."""

import os
from pathlib import Path
from typing import Any

from training.builtin.base import BASE_NAME, SOURCES, make_base
from training.errors import ConfigError

BASES = Path(".cache/base")
"""Where `make setup` puts base models, by name."""


def resolve_base(name: str) -> str:
    """A folder as it is, a name in .cache/base as that folder, anything else as a name on the hub.

    The default base is made there when it is missing (25 s).
    """
    for path in (Path(name), BASES / name):
        if (path / "config.json").is_file():
            return str(path)
    if name == BASE_NAME:
        try:
            return str(make_base(BASES / name))
        except OSError as error:
            raise ConfigError(f"model.base is {name!r}, which cannot be made in {BASES}: {error}") from error
    if name in SOURCES:
        raise ConfigError(
            f"model.base {name!r} has not been made: `python -m training.base {BASES / name} --base {name}` makes it"
        )
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/")):
        raise ConfigError(
            f"model.base is {name!r}: there is no model folder of that name, here or in {BASES}; expected a folder, "
            f"a name on the hub (ORGANIZATION/NAME), or the default base {BASE_NAME!r}"
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
