"""Tiny random bases of transformers, and what PEFT makes of their weights."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

TINY = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def make_base(folder: Path, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """A random base, saved in `folder`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**TINY)).eval()
    model.save_pretrained(folder)
    return model


def make_adapter(base: PreTrainedModel, config: LoraConfig, folder: Path) -> dict[str, Tensor]:
    """Save a random adapter as PEFT does, and take it out of `base` again: what it changes of each weight."""
    model = get_peft_model(base, config)
    before = {name: value.detach().clone() for name, value in base.named_parameters() if "lora" not in name}
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.2) if "magnitude" not in name else value.data.mul_(
                1 + 0.1 * torch.randn_like(value)
            )
    model.save_pretrained(folder, save_embedding_layers=False)
    merged = model.merge_and_unload()
    changes = {}
    for name, value in merged.named_parameters():
        old = next(v for n, v in before.items() if n.replace("base_layer.", "") == name)
        changes[name.removesuffix(".weight")] = (value.detach() - old).double()
        value.data.copy_(old)
    return {name: change for name, change in changes.items() if bool(change.any())}
