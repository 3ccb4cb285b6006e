"""A random two-layer Llama and a byte tokenizer: real parts, small enough for seconds."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training.cli import main

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ChatML."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({t: i for i, t in enumerate([*specials, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder of a random model: 2 layers, width 32."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def orders_recipe(tiny_base: Path, tmp_path: Path) -> Path:
    """A recipe over generated orders on the tiny base: 12 rows, 3 a step."""
    path = tmp_path / "tiny.toml"
    path.write_text(
        f"""
[model]
base = "{tiny_base}"
[lora]
r = 4
alpha = 8
targets = ["v_proj", "q_proj"]
[data]
path = "orders:12"
max_tokens = 900
[train]
batch_rows = 3
micro_tokens = 1200
learning_rate = 1e-2
weight_range = [0.5, 1.0]
[checkpoint]
every = 2
"""
    )
    return path


@pytest.fixture
def finished(orders_recipe: Path, tmp_path: Path) -> Path:
    """The folder of a finished run."""
    out = tmp_path / "run"
    assert main(["run", str(orders_recipe), "--out", str(out), "--set", "lora.rslora=true"]) == 0
    return out
