"""An adapter's folder made of its parts: the bytes of a weights file, and a configuration as text or single values."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from adapters.errors import AdapterError, quote
from adapters.files.json_text import read_object
from adapters.files.layout import CONFIG, WEIGHTS

NEEDED = ("r", "lora_alpha")
"""What a reader would otherwise take PEFT's defaults for, which are seldom those of a training."""
CHUNK_BYTES = 2**20


def join_parts(weights: IO[bytes], config: bytes, values: Mapping[str, object], folder: Path) -> None:
    """Write both files of an adapter into `folder`: `weights` from its start, and `config` (an adapter_config.json, or
    empty) with `values` over it.

    AdapterError 'bad_config' when the configuration is no JSON object, or says no rank or alpha.
    """
    repeated: list[str] = []
    given = read_object(config, CONFIG, repeated) if config else {}
    content = {"peft_type": "LORA", **given, **values}
    missing = [key for key in NEEDED if content.get(key) is None]
    if missing:
        raise AdapterError(
            "bad_config",
            f"the weights come without {' and '.join(missing)}: send the text of {CONFIG} as 'config', or "
            f"{' and '.join(map(repr, NEEDED))}",
        )
    if content != given:
        if repeated:
            raise AdapterError("bad_config", f"{CONFIG} has {quote(repeated[0])} twice: keep one")
        config = json.dumps(content).encode()
    (folder / CONFIG).write_bytes(config)  # as it came, when that is all: its reader has notes on it
    weights.seek(0)
    with (folder / WEIGHTS).open("xb") as out:
        shutil.copyfileobj(weights, out, CHUNK_BYTES)
