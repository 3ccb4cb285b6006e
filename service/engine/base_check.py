"""What of a base this vLLM cannot serve with adapters, said before an engine is started for it."""

import re
from collections.abc import Mapping
from typing import Any

import torch
import vllm
from pydantic import ValidationError
from vllm.model_executor.models import ModelRegistry, supports_lora
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform

from service.engine.base_folder import BaseModelError, describe_error

MAX_REASON = 500
"""Characters of vLLM's own reason."""
_UNKNOWN_ARCHITECTURE = re.compile(r"Model architectures (\[.*?\]) are not supported")
_FAILED_IMPORT = re.compile(r"Model architectures \['(\w+)'.*\] failed to be inspected")


def _try_import(architecture: str) -> str:
    """Why vLLM's model of this name, which it has imported in another process, cannot be imported."""
    try:
        ModelRegistry.models[architecture].load_model_cls()
    except ModuleNotFoundError as error:
        return f"its model {architecture} needs the package {error.name!r}, which is not installed"
    except Exception as error:  # an import may raise whatever the module raises
        return f"its model {architecture} cannot be imported: {error}"
    return f"its model {architecture} cannot be inspected, the log above says why"


def explain(error: Exception, model: str) -> BaseModelError:
    """vLLM's rejection of its configuration as one sentence."""
    reasons = (
        [str(part["msg"]) for part in error.errors()] if isinstance(error, ValidationError) else [describe_error(error)]
    )
    text = " ".join("; ".join(reasons).removeprefix("Value error, ").split())
    if unknown := _UNKNOWN_ARCHITECTURE.search(text):
        text = f"it has no model for {unknown[1]}"
    elif failed := _FAILED_IMPORT.search(text):
        text = _try_import(failed[1])
    return BaseModelError(f"vLLM {vllm.__version__} cannot serve the base {model!r}: {text[:MAX_REASON]}")


def check_base(config: Any) -> None:
    """`BaseModelError` when this vLLM cannot serve adapters on the base of `config`, its full configuration."""
    model = config.model_config
    if model.runner_type != "generate":
        raise BaseModelError(f"the base {model.model!r} does not generate text: expected a causal language model")
    if model.is_moe and config.lora_config.target_modules is None and current_platform.is_cpu():
        raise BaseModelError(
            f"the base {model.model!r} has experts (mixture of experts), and vLLM {vllm.__version__} computes adapters "
            "on experts with Triton kernels, which its CPU build lacks; serve it on a GPU, or choose a dense base"
        )
    architecture, _ = model.registry.resolve_model_cls(model.architectures, model)
    if not supports_lora(architecture):
        raise BaseModelError(
            f"vLLM {vllm.__version__} has no LoRA for the base {model.model!r} ({architecture.__name__}); choose a "
            "base of another family"
        )
    _check_quantization(model)
    _check_inputs(model)


def _check_quantization(model: Any) -> None:
    """`BaseModelError` for quantized weights with which the CPU build cannot compute."""
    quantization = getattr(model.hf_config, "quantization_config", None)
    if not isinstance(quantization, Mapping) or not current_platform.is_cpu():
        return
    if missing := _missing_kernel(quantization):
        raise BaseModelError(
            f"the CPU build of vLLM {vllm.__version__} cannot compute adapters on the base {model.model!r} on this "
            f"machine, since it is quantized as {missing}; serve it on a GPU, or serve the base that it was made from"
        )


def _missing_kernel(quantization: Mapping[str, Any]) -> str:
    """Which form of quantization lacks a kernel in the CPU build; empty when none is known to."""
    method = quantization.get("quant_method")
    if method == "fp8":
        return _missing_fp8("block" if quantization.get("weight_block_size") else "tensor")
    if method == "gptq" and quantization.get("bits") != 4:
        return f"GPTQ with {quantization.get('bits')} bits"
    if method == "compressed-tensors":
        for group in quantization.get("config_groups", {}).values():
            if (group.get("input_activations") or {}).get("type") == "int":
                return (
                    "integers for weights and inputs"  # its layers have no weight left, of which LoRA asks the device
                )
            weights = group.get("weights") or {}
            if (weights.get("type"), weights.get("num_bits")) == ("float", 8) and (
                missing := _missing_fp8(weights.get("strategy"))
            ):
                return missing
    return ""


def _missing_fp8(strategy: object) -> str:
    """The same for FP8 with scales by compressed-tensors' name of what has one."""
    if strategy == "tensor":
        return "FP8 with one scale per layer"  # the kernel that joins the scales of q, k and v is an empty name there
    if strategy == "block" and not torch.cpu.get_capabilities().get("amx_tile"):
        return "FP8 in blocks, which takes a CPU with AMX"
    return ""


def _check_inputs(model: Any) -> None:
    """`BaseModelError` for a base with images, video or sound when what prepares them cannot be made here."""
    if not model.supports_multimodal_inputs:
        return
    try:
        MULTIMODAL_REGISTRY.create_processor(model)
    except Exception as error:  # transformers raises many types: files, packages that are missing
        reason = " ".join(str(error).split())[:MAX_REASON]
        raise BaseModelError(
            f"the base {model.model!r} takes more than text, which cannot be prepared here: {reason}; to serve its "
            "language model alone, add --language-model-only to FUSION_ENGINE_ARGS"
        ) from error
