"""Copies of the base's weights in an adapter's files, left out where they are the base's own, number for number."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from adapters.convert.source import RawAdapter
from adapters.errors import AdapterError, quote
from adapters.files.base_weights import BaseWeights
from adapters.module_names import unwrap

WEIGHT = ".weight"


class DropCopies:
    """A change for `convert`: the adapter without tensors that equal the weight of the base of their name.

    PEFT saves embeddings and output heads whole when the vocabulary's size was changed before the training. An adapter
    trained on a base that was saved after that needs none of them.
    """

    def __init__(self, base: Path) -> None:
        self._base = BaseWeights(base)

    def __call__(self, raw: RawAdapter) -> RawAdapter:
        """AdapterError 'modules_to_save' for a weight that differs from the base's, 'base' for one it lacks."""
        names = [name for name in raw.tensors if "lora_" not in name and name.endswith(WEIGHT)]
        for name in names:
            module = unwrap(name.removesuffix(WEIGHT).removesuffix(".base_layer"))[0]
            if not _is_equal(raw.tensors[name], self._base.read(module)):
                raise AdapterError(
                    "modules_to_save",
                    f"the adapter holds {quote(name)}, which differs from the base's {quote(module + WEIGHT)}: it was "
                    "trained, or belongs to another base, so it is not a copy that can be left out",
                )
        notes = tuple(f"left out {quote(name)}, which equals the base's weight" for name in names)
        config = raw.config
        if saved := config.get("modules_to_save"):  # tensors of these modules that are not weights are refused later
            config = {**config, "modules_to_save": None}
            notes += (f"modules_to_save={quote(saved)} was set to null",)
        tensors = {name: tensor for name, tensor in raw.tensors.items() if name not in names}
        return replace(raw, config=config, tensors=tensors, notes=(*raw.notes, *notes))


def _is_equal(copy: Tensor, weight: Tensor) -> bool:
    """Whether the copy holds the base's numbers, rounded to its dtype if that is narrower than the base's."""
    return copy.shape == weight.shape and torch.equal(copy, weight.to(copy.dtype))
