"""QLoRA, where bitsandbytes is installed (it computes on CPUs, too), against PEFT's own forward."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.training.test_answer_only import SOLO, TALK, compute_reference, compute_step, load, write_talks
from training.loop.model import load_model

pytest.importorskip("bitsandbytes")

TOLERANCE = 0.02
"""Relative; products with the base are computed in bfloat16."""
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


@pytest.fixture
def wide_base(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The folder of a random model as wide as a block of NF4."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), num_key_value_heads=4, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    tiny_tokenizer.save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.parametrize("pack", [True, False])
def test_answer_only_adapters_learn_what_two_passes_give(
    orders_recipe: Path, wide_base: Path, tmp_path: Path, pack: bool
) -> None:
    settings = [f"data.path={write_talks(tmp_path)}", "model.quantize=4bit", f"train.pack={str(pack).lower()}"]
    settings += [f"model.base={wide_base}", "train.weight_range=[1.0, 1.0]", "train.batch_rows=8"]
    config, data, model = load(orders_recipe, *settings)
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    model.train()  # as training does; on CPUs, 4-bit layers have no gradient else
    loss, gradients = compute_step(config, data, model)
    expected, wanted = compute_reference(wide_base, model, config, [TALK, SOLO], 1.0, quantization_config=NF4)
    assert loss == pytest.approx(expected, rel=TOLERANCE)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() <= TOLERANCE * wanted[name].norm(), name
    everywhere = replace(config, lora=replace(config.lora, answer_only=False))
    plain = load_model(everywhere, everywhere.model.base)
    factors = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for name, parameter in plain.named_parameters():
        if name in factors:
            parameter.data.copy_(factors[name])
    plain.train()
    _, others = compute_step(everywhere, data, plain)
    assert any((others[n] - wanted[n]).norm() > 5 * TOLERANCE * wanted[n].norm() for n in wanted), "the mask decides"
