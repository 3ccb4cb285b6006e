"""Tiny random bases of many model families, made on the spot, with two random adapters each, and their reference."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.service.reference import PeftReference

VOCABULARY = 512
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 16
"""Tokens that windowed attention sees: fewer than the prompts have."""
GEMMA_3: Mapping[str, Any] = {
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """A model family by transformers' name for it: what its configuration has beside `SIZES`, its linear layers."""

    kind: str
    modules: Sequence[str] = SPLIT
    settings: Mapping[str, Any] = field(default_factory=dict)
    sees: bool = False
    """Whether it has a vision tower beside its language model, on which alone the adapters then act."""


FAMILIES: Mapping[str, Family] = {
    "Llama": Family("llama", settings={"attention_bias": True, "mlp_bias": True}),
    "Qwen2": Family("qwen2"),
    "Qwen3": Family("qwen3", settings={"head_dim": 32}),
    "Mistral": Family("mistral", settings={"head_dim": 32, "sliding_window": WINDOW}),
    "Gemma 2": Family(
        "gemma2",
        settings={
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "Gemma 3": Family("gemma3_text", settings=GEMMA_3),
    "Phi-3": Family("phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "Granite": Family(
        "granite",
        settings={
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.25,
        },
    ),
    "OLMo 2": Family("olmo2"),
    "Starcoder 2": Family("starcoder2", ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj")),
    "GPT-NeoX": Family(
        "gpt_neox", ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), {"num_key_value_heads": 4}
    ),
    "OPT": Family(
        "opt", ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), {"ffn_dim": 192, "word_embed_proj_dim": 128}
    ),
    "Falcon": Family("falcon", ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
}
"""Every family that the README or the documentation names."""

QUANTIZED = Family("llama", settings={"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8})
"""The base that is quantized: wide enough for two groups and blocks."""

VISION: Mapping[str, Family] = {
    "Qwen2-VL": Family(
        "qwen2_vl",
        settings={
            "text_config": {**SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
            "vision_config": {"depth": 1, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2},
            "image_token_id": 508,
            "video_token_id": 509,
            "vision_start_token_id": 510,
            "vision_end_token_id": 511,
        },
        sees=True,
    ),
    "LLaVA": Family(
        "llava",
        settings={
            "text_config": {**SIZES, "model_type": "llama"},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "projection_dim": 64,
            },
            "image_token_index": 511,
        },
        sees=True,
    ),
    "Gemma 3 with vision": Family(
        "gemma3",
        settings={
            "text_config": {**SIZES, **GEMMA_3},
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 509,
            "boi_token_index": 510,
            "eoi_token_index": 511,
        },
        sees=True,
    ),
}
"""Families whose language model adapters act on; asked with text alone."""


def save_tokenizer(folder: Path) -> None:
    """One word per token id: `t0`, `t1`, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"pad_token": "t0", "bos_token": "t1", "eos_token": "t2", "unk_token": "t3"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)


def randomize(model: Any, seed: int) -> None:
    """Give every parameter a part in the result: norms and biases too, which transformers sets to ones and zeros."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)


def model_class(family: Family) -> Any:
    """transformers' class that makes and loads models of this family."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if family.sees else AutoModelForCausalLM


def make_base(family: Family, folder: Path) -> Path:
    """A random base of this family, float32, with a tokenizer."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(family.kind, **{**({} if family.sees else SIZES), **family.settings})
    model = model_class(family).from_config(config, attn_implementation="eager")
    randomize(model, 0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def make_adapters(base: Path, name: str, family: Family, folder: Path) -> dict[str, Path]:
    """`x` on all linear layers, `y` on every other kind of them; their B is large enough to be seen."""
    from peft import LoraConfig, get_peft_model

    paths = {}
    for seed, (adapter, rank, modules) in enumerate((("x", 4, family.modules), ("y", 2, family.modules[::2]))):
        torch.manual_seed(100 + seed)
        model = model_class(family).from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        targets = rf".*language_model.*\.({'|'.join(modules)})" if family.sees else list(modules)
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
        for parameter, value in model.named_parameters():
            if "lora_B" in parameter:
                torch.nn.init.normal_(value, std=0.2)
        model.peft_config["default"].base_model_name_or_path = name
        model.save_pretrained(folder / adapter, save_embedding_layers=False)  # else it asks the hub for the base
        paths[adapter] = folder / adapter
    return paths


def make_reference(base: Path, adapters: Mapping[str, Path], family: Family) -> PeftReference:
    """Both adapters side by side. Attention is "eager": transformers' fused attention leaves out the soft cap of Gemma
    2.
    """
    plain = model_class(family).from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    return PeftReference(plain, adapters)


def change_inputs(reference: PeftReference, change: Callable[[Any], Any]) -> None:
    """Have every layer of the base see its inputs changed; the adapters see them as they are."""
    for layer in reference.layers:
        layer.base_layer.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
