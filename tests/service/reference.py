"""What transformers and PEFT answer, written apart from the service."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoTokenizer

from adapters import parse
from tests.conftest import BASE


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


def token_ids(prompt: str) -> list[int]:
    """Of the default base's tokenizer."""
    return list(_tokenizer()(prompt)["input_ids"])


class PeftReference:
    """transformers + PEFT on `base`: all adapters loaded, those of a recipe active at its weights."""

    def __init__(self, base: Any, folders: Mapping[str, Path]) -> None:
        first, *others = folders.items()
        self.model = PeftModel.from_pretrained(base, first[1], adapter_name=first[0])
        for name, folder in others:
            self.model.load_adapter(folder, adapter_name=name)
        self.layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        self.unit = [dict(layer.scaling) for layer in self.layers]
        self.names = list(folders)

    @torch.inference_mode()
    def log_probabilities(self, ids: Sequence[int], recipe: str | None) -> list[float]:
        """Of every token after the first, under a plain sum of adapters; None is the base."""
        weights = {} if recipe is None else parse(recipe).weights
        for layer, unit in zip(self.layers, self.unit, strict=True):
            for name, scaling in unit.items():
                layer.scaling[name] = scaling * weights.get(name, 0.0)
        self.model.base_model.set_adapter(list(weights) or self.names[:1])
        logits = self.model(torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)
        return [float(logits[i, token]) for i, token in enumerate(ids[1:])]
