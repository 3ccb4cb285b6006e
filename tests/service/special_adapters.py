"""Adapters on the embedding and the output head as PEFT saves them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

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
