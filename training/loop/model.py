"""The model that is trained: base, LoRA layers, attention that keeps packed rows apart, loss on wanted tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.config import Config, ConfigError
from training.loop.lora_linear import fuse_layers
from training.rows.encoding import IGNORE, Pass

BASES = Path(".cache/base")
"""Where `make setup` puts base models, by name."""
ATTENTION = "packed_rows"
MASKED_TOKENS = 4096
"""Lines of at most so many tokens attend in one masked product on GPUs, where a product for every row would leave them
waiting for the next; CPUs save by not computing what the mask hides."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-mixed": torch.bfloat16, "fp16": torch.float16}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    row_lengths: tuple[int, ...] | None = None,
    shared: int = 0,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside every row of a packed line, each also seeing the `shared` tokens ahead of all; without
    `row_lengths` inside every line, where padding on the right needs no mask. Tensors lines×heads×tokens×width;
    transformers' attention interface. ConfigError for a base whose attention is more than this.
    """
    if other := sorted(name for name in ("softcap", "s_aux") if unused.get(name) is not None):
        raise ConfigError(f"the base's attention has {other[0]}, which this training does not compute")
    lengths = (shared, *(row_lengths if row_lengths is not None else [query.shape[2]]))
    window = unused.get("sliding_window")
    if window is not None and (longest := shared + max(lengths[1:])) > window:
        raise ConfigError(f"the base sees {window} tokens back and a row has {longest}: set data.max_tokens = {window}")
    if query.is_cuda and len(lengths) > 2 and sum(lengths) <= MASKED_TOKENS:
        return masked(query, key, value, rows_mask(lengths, query.device), scaling, dropout), None
    (head, *rows) = zip(*(torch.split(x, list(lengths), 2) for x in (query, key, value)), strict=True)
    parts: list[Tensor] = []
    for row in rows:
        # Every row asks for the shared tokens anew: a plain causal product is quicker than a masked smaller one.
        q, k, v = (torch.cat(pair, 2) for pair in zip(head, row, strict=True)) if shared else row
        seen = functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        parts.append(seen[:, :, shared:] if parts else seen)
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention in one product, lines×tokens×heads×width, with keys and values repeated where queries share them: of
    the kernels that take a mask none does that itself.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return seen.transpose(1, 2).contiguous()


@lru_cache(maxsize=2)
def rows_mask(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Who sees whom in a packed line, bool tokens×tokens: the tokens before in the same row, and in the first, shared
    one. Kept, for every layer of a pass asks for the same.
    """
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    same = (row[:, None] == row) | (row == 0)
    return same.tril_()


class AnswerLoss(nn.Module):
    """A causal language model that returns the loss of the wanted tokens, so that FSDP sees one forward."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Pass) -> Tensor:
        """Loss of every wanted token, nats, float32, in the order of the labels. The output layer, a fifth of a
        small model, runs on the positions before wanted tokens only.
        """
        causal = self.model.get_base_model()
        hidden = causal.base_model(
            input_ids=batch.ids,
            position_ids=batch.positions,
            use_cache=False,
            row_lengths=batch.lengths if batch.packed else None,
            shared=batch.shared,
        ).last_hidden_state
        targets = batch.labels[:, 1:]
        wanted = targets != IGNORE
        logits = causal.get_output_embeddings()(hidden[:, :-1][wanted])
        return functional.cross_entropy(logits.float(), targets[wanted], reduction="none")


def find_base(name: str) -> str:
    """A folder as it is, a name in .cache/base as that folder, anything else as a name on the hub."""
    for path in (Path(name), BASES / name):
        if (path / "config.json").is_file():
            return str(path)
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/")):
        raise ConfigError(
            f"model.base is {name!r}: there is no model folder of that name, here or in {BASES}; "
            f"the default base is made with: python -m training.base {BASES}/smollm2-135m-instruct"
        )
    return name


def load_tokenizer(base: str) -> Any:
    """The base's tokenizer; its padding token is the end token if it has none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: Config, base: str) -> AnswerLoss:
    """The base in the policy's precision, with fresh LoRA layers (A random by train.seed, B zero); only those are
    trained, in float32 unless the precision is bf16.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION, attend)
    options: dict[str, Any] = {"dtype": DTYPES[config.policy.precision], "attn_implementation": ATTENTION}
    if config.model.quantize == "4bit":
        options["quantization_config"] = _four_bit()
    try:
        causal = AutoModelForCausalLM.from_pretrained(base, **options)
    except OSError as error:
        raise ConfigError(f"model.base {base!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    for name, plain in (("final_logit_softcapping", None), ("logits_scaling", 1), ("logit_scale", 1)):
        if getattr(causal.config, name, None) not in (None, plain):
            raise ConfigError(f"model.base {base!r} has {name}, which this training does not compute")
    if config.model.quantize == "4bit":
        causal = prepare_model_for_kbit_training(causal, use_gradient_checkpointing=False)
    targets = list(config.lora.targets)
    torch.manual_seed(config.train.seed)
    try:
        wrapped = get_peft_model(
            causal,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=config.lora.r,
                lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # PEFT takes floats, its types say int
                target_modules="all-linear" if targets == ["all-linear"] else targets,
                lora_dropout=config.lora.dropout,
                use_rslora=config.lora.rslora,
            ),
        )
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, one in causal.named_modules() if isinstance(one, nn.Linear)})
        raise ConfigError(
            f"lora.targets {targets} match no layer of the base: its linear layers are {names}"
        ) from error
    wanted = torch.bfloat16 if config.policy.precision == "bf16" else torch.float32
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(wanted)
    fuse_layers(wrapped)
    _checkpoint_activations(causal, config)
    return AnswerLoss(wrapped)


def _four_bit() -> Any:
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401 - only whether it is there
    except ImportError:
        raise ConfigError('model.quantize = "4bit" needs bitsandbytes and a GPU: pip install bitsandbytes') from None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the longest list of modules."""
    longest: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(longest):
            longest = list(module)
    return longest


def _checkpoint_activations(causal: Any, config: Config) -> None:
    policy = config.policy
    if policy.checkpointing == "none":
        return
    causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if policy.checkpointing == "selective":
        for i, layer in enumerate(layers(causal)):
            setattr(layer, "gradient_checkpointing", i % policy.selective_every == 0)  # noqa: B010 - no attribute of Module


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by the names that adapter files have: base_model.model.….lora_A.weight."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[file_name(name)] = parameter
    return found


def file_name(name: str) -> str:
    """The name in an adapter file of a parameter of `AnswerLoss`."""
    return name.removeprefix("model.").replace(".default.weight", ".weight")


def set_weight(model: nn.Module, weight: float) -> None:
    """Let the adapter act at `weight` times its own scaling."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", weight)


def base_name(base: str) -> str:
    """What an adapter says of its base: a folder's name, or the name on the hub."""
    return os.path.basename(os.path.normpath(base)) if os.path.isdir(base) else base


def adapter_config(config: Config, names: Mapping[str, object], base: str) -> dict[str, object]:
    """adapter_config.json of the trained adapter: PEFT's own keys, sorted targets, no path of this machine."""
    targets = sorted({name.removesuffix(".weight").rpartition(".lora_")[0].rpartition(".")[2] for name in names})
    alpha = config.lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name(base),
        "r": config.lora.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.lora.dropout,
        "use_rslora": config.lora.rslora,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
