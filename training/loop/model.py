"""The base with trainable LoRA layers, and their parameters by the names of adapter files."""

from typing import Any

import torch
from torch import nn

from training.config import Config, LoraConfig
from training.errors import ConfigError
from training.loop.attention import ATTENTION_NAME, attend
from training.loop.lora_linear import AnswerMask, fuse_layers, mask_layers
from training.loop.loss import AnswerLoss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-mixed": torch.bfloat16, "fp16": torch.float16}
UNSUPPORTED = (("final_logit_softcapping", None), ("logits_scaling", 1), ("logit_scale", 1))
"""Keys of a base's configuration that change its logits, which `AnswerLoss` does not compute, with the value that
changes nothing."""


def load_model(config: Config, base: str) -> AnswerLoss:
    """The base in the policy's precision, with fresh LoRA layers (A random by train.seed, B zero); only those are
    trained, in float32 unless the precision is bf16.
    """
    causal = _load_base(config, base)
    torch.manual_seed(config.train.seed)
    model = _add_lora(causal, config.lora)
    dtype = torch.bfloat16 if config.policy.precision == "bf16" else torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    fuse_layers(model)
    mask = AnswerMask() if config.lora.answer_only else None
    if mask is not None:
        mask_layers(causal.base_model, mask)  # not the output layer, which sees what predicts target tokens only
    _checkpoint_activations(causal, config)
    return AnswerLoss(model, mask)


def _load_base(config: Config, base: str) -> Any:
    from peft import prepare_model_for_kbit_training
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION_NAME, attend)
    options: dict[str, Any] = {"dtype": DTYPES[config.policy.precision], "attn_implementation": ATTENTION_NAME}
    quantized = config.model.quantize == "4bit"
    if quantized:
        options["quantization_config"] = _quantization_config()
    try:
        causal = AutoModelForCausalLM.from_pretrained(base, **options)
    except OSError as error:
        raise ConfigError(f"model.base {base!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    for name, neutral in UNSUPPORTED:
        if getattr(causal.config, name, None) not in (None, neutral):
            raise ConfigError(f"model.base {base!r} has {name}, which training does not support: choose another base")
    return prepare_model_for_kbit_training(causal, use_gradient_checkpointing=False) if quantized else causal


def _quantization_config() -> Any:
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401 - only whether it is installed
    except ImportError:
        raise ConfigError('model.quantize = "4bit" needs bitsandbytes and a GPU: pip install bitsandbytes') from None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _add_lora(causal: Any, lora: LoraConfig) -> Any:
    import peft

    targets = list(lora.targets)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes floats, its types say int
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
    )
    try:
        return peft.get_peft_model(causal, config)
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, one in causal.named_modules() if isinstance(one, nn.Linear)})
        raise ConfigError(
            f"lora.targets {targets} match no layer of the base: its linear layers are {names}"
        ) from error


def list_layers(model: nn.Module) -> list[nn.Module]:
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
        for i, layer in enumerate(list_layers(causal)):
            setattr(layer, "gradient_checkpointing", i % policy.selective_every == 0)  # noqa: B010 - not an attribute of Module


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters, by their names in adapter files: base_model.model.….lora_A.weight."""
    return {file_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def file_name(name: str) -> str:
    """The name that a parameter of `AnswerLoss` has in an adapter file."""
    return name.removeprefix("model.").replace(".default.weight", ".weight")


def set_weight(model: nn.Module, weight: float) -> None:
    """Let the adapter act at `weight` times its own scaling."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", weight)
