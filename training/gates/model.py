"""A gate in training: a base with a LoRA that acts at the last position of prompts alone, and its value."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import adapters
from training.errors import ConfigError
from training.gates.config import GateConfig
from training.gates.prefill import Prefill
from training.loop.lora_linear import NAME, fuse_layers
from training.loop.model import UNSUPPORTED


@dataclass(frozen=True, slots=True, eq=False)
class GateModel:
    """A base with a LoRA that acts at the last position of prompts alone; `yes` and `no` are token ids.

    `adapted` is the base wrapped by PEFT, `prefill` what the bare base computed of the positions before.
    """

    adapted: Any
    yes: int
    no: int

    def measure(self, prefill: Prefill, numbers: Sequence[int]) -> Tensor:
        """log p(yes) - log p(no) of the token after each prompt, float32: the difference of their logits."""
        causal = self.adapted.get_base_model()
        cache, mask, position = prefill.make_cache(numbers, causal.device)
        ids = prefill.last[list(numbers)][:, None].to(causal.device)
        output = causal.base_model(input_ids=ids, past_key_values=cache, attention_mask=mask, position_ids=position)
        hidden = output.last_hidden_state[:, -1]
        head = causal.get_output_embeddings()
        value: Tensor = hidden @ (head.weight[self.yes] - head.weight[self.no]).detach()
        bias = getattr(head, "bias", None)
        return value if bias is None else value + (bias[self.yes] - bias[self.no]).detach()

    @torch.inference_mode()
    def measure_all(self, prefill: Prefill, batch: int = 64) -> Tensor:
        """The value of every prompt, float64, in their order; of `batch` prompts of about one length at a time."""
        values = torch.empty(len(prefill.own), dtype=torch.float64)
        order = sorted(range(len(values)), key=lambda number: prefill.own[number].shape[3])
        self.adapted.eval()
        for start in range(0, len(order), batch):
            numbers = order[start : start + batch]
            values[numbers] = self.measure(prefill, numbers).double().cpu()
        return values


def find_token(tokenizer: Any, text: str) -> int:
    """The id of the one token that `text` is; ConfigError when it is none or several."""
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ConfigError(f"{text!r} is {len(ids)} tokens of the base: expected one; choose another --yes or --no")
    return ids[0]


def load_causal(folder: str) -> Any:
    """The base in float32, on a GPU if there is one; ConfigError for a base that is none, or changes its logits."""
    from transformers import AutoModelForCausalLM

    try:
        causal = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except OSError as error:
        raise ConfigError(f"the base {folder!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    for name, neutral in UNSUPPORTED:
        if getattr(causal.config, name, None) not in (None, neutral):
            raise ConfigError(f"the base {folder!r} has {name}, which a gate does not support: choose another base")
    return causal.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def add_lora(causal: Any, config: GateConfig) -> Any:
    """The base wrapped by PEFT, with a fresh LoRA of scaling 1 on the layers of `config`; ConfigError when it has no
    such layer, or the LoRA would be larger than a gate may be.
    """
    import peft

    torch.manual_seed(config.seed)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.rank,
        target_modules=list(config.targets),
        lora_dropout=config.dropout,
    )
    try:
        adapted = peft.get_peft_model(causal, lora)
    except ValueError as error:
        raise ConfigError(f"the targets {', '.join(config.targets)} match no layer of the base") from error
    size = 2 * sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    if size > adapters.MAX_GATE_BYTES:
        raise ConfigError(
            f"the gate would have {size} bytes, rank {config.rank} in {', '.join(config.targets)}: expected at most "
            f"{adapters.MAX_GATE_BYTES}; lower --rank or choose fewer --targets"
        )
    fuse_layers(adapted)
    return adapted


def round_factors(model: GateModel) -> GateModel:
    """Round the factors, in place, to the float16 they are stored in."""
    for parameter in model.adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half().float()
    return model


def make_adapter(model: GateModel, base: str, readout: adapters.Readout) -> adapters.LoraAdapter:
    """The LoRA of `model` in float16, as a gate."""
    from peft.tuners.lora import LoraLayer

    modules = {}
    for name, layer in model.adapted.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (factors[NAME].weight.detach().half().cpu() for factors in (layer.lora_A, layer.lora_B))
            modules[name.removeprefix("base_model.model.")] = adapters.LoraModule(a, b, layer.scaling[NAME])
    return replace(adapters.make_adapter(modules, base), gate=readout)
