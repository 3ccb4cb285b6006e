"""The weights of a base in a Hugging Face folder, read one at a time: model.safetensors, or its parts by the index."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from adapters.errors import AdapterError, did_you_mean, quote

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
MAX_INDEX_BYTES = 64 << 20
WHOLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of a base that is not quantized."""


class BaseWeights:
    """The weights of the base in `folder`; AdapterError 'base' when it has none that can be read."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise AdapterError(
                "base", f"{quote(str(folder))} is not a folder: expected that of the base the adapter was trained on"
            )
        self._files = self._read_index()

    def read(self, module: str) -> Tensor:
        """`<module>.weight` as it is stored: d_out×d_in of a linear layer, vocabulary×d of an embedding."""
        name = f"{module}.weight"
        if name not in self._files and module == "lm_head" and EMBEDDING in self._files:  # the two are one matrix
            name = EMBEDDING
        if name not in self._files:
            hint = did_you_mean(name, self._files) or "the adapter was trained on another base"
            raise AdapterError("base", f"the base has no weight {quote(name)}: {hint}")
        try:
            with safe_open(self._folder / self._files[name], framework="pt") as file:
                weight: Tensor = file.get_tensor(name)
        except Exception as error:  # the library raises many types
            raise AdapterError("base", f"{self._files[name]!r} of the base cannot be read: {error}") from error
        if weight.ndim != 2 or weight.dtype not in WHOLE:
            raise AdapterError(
                "base",
                f"the base's {quote(name)} is {weight.dtype}, {tuple(weight.shape)}: expected a matrix of a base that "
                "is not quantized",
            )
        return weight

    def _read_index(self) -> dict[str, str]:
        """The file of each weight, by name."""
        index = self._folder / INDEX
        if index.is_file() and index.stat().st_size <= MAX_INDEX_BYTES:
            try:
                content = json.loads(index.read_bytes())
            except (ValueError, RecursionError) as error:
                raise AdapterError("base", f"{INDEX} of the base cannot be read as JSON: {error}") from error
            files = content.get("weight_map") if isinstance(content, dict) else None
            if isinstance(files, dict) and all(isinstance(f, str) and Path(f).name == f for f in files.values()):
                return files
            raise AdapterError("base", f"{INDEX} of the base has no weight_map of names to files")
        if not (self._folder / SINGLE).is_file():
            raise AdapterError("base", f"the base's folder has no {SINGLE} and no {INDEX}: expected safetensors files")
        try:
            with safe_open(self._folder / SINGLE, framework="pt") as file:
                return dict.fromkeys(file.keys(), SINGLE)
        except Exception as error:  # the library raises many types
            raise AdapterError("base", f"{SINGLE} of the base cannot be read: {error}") from error
