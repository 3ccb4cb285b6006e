"""Adapters as people have them: made by PEFT on a tiny random model, then changed as their tools change them."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import LoraAdapter
from tests.adapters.samples import CONFIG, WEIGHTS

PREFIX = "base_model.model."
Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_"
EXPECTED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"}
"""What vLLM lets an adapter of this family have."""
Change = Callable[[Path], None]


TINY: Mapping[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": False},
}


def tiny(changes: Mapping[str, Any] = MappingProxyType({})) -> transformers.LlamaForCausalLM:
    """The same random model each time, with `changes` of its configuration."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, **changes})).eval()


def train(
    folder: Path, *, copies: bool = False, model: Mapping[str, Any] = MappingProxyType({}), **options: Any
) -> None:
    """Save an adapter with an effect, as PEFT does; `copies` of the embedding layers too."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **options})
    adapted = peft.get_peft_model(tiny(model), config)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(str(folder), save_embedding_layers=copies)


def configure(**keys: object) -> Change:
    """Change keys of the configuration."""

    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**content, **keys}))

    return change


def drop(key: str) -> Change:
    """Remove a key of the configuration."""

    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        del content[key]
        (folder / CONFIG).write_text(json.dumps(content))

    return change


def rewrite(old: str, new: str) -> Change:
    """Change the configuration's text."""

    def change(folder: Path) -> None:
        text = (folder / CONFIG).read_text()
        assert old in text
        (folder / CONFIG).write_text(text.replace(old, new, 1))

    return change


def retensor(change_all: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Change:
    """Change the tensors."""

    def change(folder: Path) -> None:
        tensors = change_all(load_file(folder / WEIGHTS))
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)

    return change


def rename(old: str, new: str) -> Change:
    """Change the tensors' names."""
    return retensor(lambda tensors: {name.replace(old, new, 1): tensor for name, tensor in tensors.items()})


def together(*changes: Change) -> Change:
    """One change after the other."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


@cache
def tokens() -> Tensor:
    torch.manual_seed(2)
    return torch.randint(0, 64, (2, 9))


@torch.no_grad()
def logits(deltas: Mapping[str, Tensor], changes: Mapping[str, Any] = MappingProxyType({})) -> Tensor:
    """What the model says with these updates, d_out×d_in by module, added to its weights."""
    model = tiny(changes)
    for name, delta in deltas.items():
        layer = model.get_submodule(name)
        change = (delta.T if isinstance(layer, torch.nn.Embedding) else delta).to(layer.weight.dtype)
        layer.weight = torch.nn.Parameter(layer.weight + change)  # its own, where two layers share one
    found: Tensor = model(tokens()).logits
    return found


def our_logits(adapter: LoraAdapter, changes: Mapping[str, Any] = MappingProxyType({})) -> Tensor:
    return logits({name: module.delta() for name, module in adapter.modules.items()}, changes)


@torch.no_grad()
def peft_logits(folder: Path, changes: Mapping[str, Any] = MappingProxyType({})) -> Tensor:
    found: Tensor = peft.PeftModel.from_pretrained(tiny(changes), str(folder)).eval()(tokens()).logits
    return found


def vllm_logits(folder: Path) -> Tensor:
    """By vLLM's own reading of the files."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(str(folder), None)
    model = LoRAModel.from_local_checkpoint(
        str(folder), EXPECTED, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    return logits({name: layer.scaling * (layer.lora_b @ layer.lora_a) for name, layer in model.loras.items()})
