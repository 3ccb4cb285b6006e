"""Adapters on the embedding and the output head as PEFT saves them, and what PEFT answers with them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from adapters import parse

SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "head": {"r": 4, "lora_alpha": 6, "target_modules": ["lm_head"]},
    "ends": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["lm_head", "embed_tokens", "v_proj"]},
    "words": {"r": 2, "lora_alpha": 8, "target_modules": ["embed_tokens"], "rank_pattern": {"embed_tokens": 5}},
    "dense": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]},
}
"""LoraConfig's arguments, by name."""


def make_special(base: PreTrainedModel, name: str, folder: Path, base_name: str) -> Path:
    """One of the SPECIAL adapters, random; PEFT takes the adapter's layers back out of `base`."""
    torch.manual_seed(sorted(SPECIAL).index(name))
    model = get_peft_model(base, LoraConfig(**SPECIAL[name]))
    for parameter, value in model.named_parameters():
        if "lora_B" in parameter or "lora_embedding_" in parameter:
            torch.nn.init.normal_(value, std=0.5 if "embedding_A" in parameter else 0.02)
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(folder / name, save_embedding_layers=False)
    model.unload()
    return folder / name


class PeftReference:
    """transformers + PEFT: all adapters loaded, those of a recipe active at its weights."""

    def __init__(self, base: PreTrainedModel, folders: Mapping[str, Path]) -> None:
        first, *others = folders.items()
        self.model = PeftModel.from_pretrained(base, first[1], adapter_name=first[0])
        for name, folder in others:
            self.model.load_adapter(folder, adapter_name=name)
        self.layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        self.unit = [dict(layer.scaling) for layer in self.layers]
        self.names = list(folders)

    @torch.inference_mode()
    def log_probabilities(self, ids: list[int], recipe: str | None) -> list[float]:
        """Of every token after the first."""
        weights = {} if recipe is None else parse(recipe).weights
        for layer, unit in zip(self.layers, self.unit, strict=True):
            for name, scaling in unit.items():
                layer.scaling[name] = scaling * weights.get(name, 0.0)
        self.model.base_model.set_adapter(list(weights) or self.names[:1])
        logits = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return [float(logits[i, token]) for i, token in enumerate(ids[1:])]
