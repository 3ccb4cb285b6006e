"""Tiny quantized bases in the formats that people bring, packed by hand, and the same base with plain weights."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns lies at which place of an AWQ word."""

Packed = tuple[dict[str, Tensor], Tensor]
"""A layer's tensors in a format, by the ends of their names, and the weight [d_out, d_in] that they stand for."""


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """4-bit groups along the input: values 0 to 15 [d_in, d_out], scales [groups, d_out], the weight they stand for."""
    groups = weight.t().reshape(-1, GROUP, weight.shape[0])
    scales = (groups.abs().amax(1, keepdim=True) / 7).half().float()
    values = ((groups / scales).round() + 8).clamp(0, 15)
    plain = ((values - 8) * scales).reshape(-1, weight.shape[0]).t().contiguous()
    return values.reshape(-1, weight.shape[0]).long(), scales[:, 0], plain


def _pack(values: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """[rows, columns] of 4-bit values as int32 words of eight columns."""
    words = values.reshape(values.shape[0], -1, 8)[:, :, list(order)]
    packed = sum(words[:, :, i] << (4 * i) for i in range(8))
    assert isinstance(packed, Tensor)
    return ((packed + 2**31) % 2**32 - 2**31).to(torch.int32).contiguous()


def awq(weight: Tensor) -> Packed:
    values, scales, plain = _quantize(weight)
    zeros = torch.full_like(scales, 8).long()
    tensors = {"qweight": _pack(values, AWQ_ORDER), "qzeros": _pack(zeros, AWQ_ORDER), "scales": scales.half()}
    return tensors, plain


def gptq(weight: Tensor) -> Packed:
    values, scales, plain = _quantize(weight)
    zeros = torch.full_like(scales, 7).long()  # the format stores them less one
    index = torch.arange(weight.shape[1], dtype=torch.int32) // GROUP
    packed = _pack(values.t().contiguous()).t().contiguous()
    return {"qweight": packed, "qzeros": _pack(zeros), "scales": scales.half(), "g_idx": index}, plain


def fp8(weight: Tensor) -> Packed:
    scale = weight.abs().max() / 448
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def fp8_blocks(weight: Tensor) -> Packed:
    rows, columns = weight.shape
    blocks = torch.nn.functional.pad(weight, (0, -columns % 128, 0, -rows % 128))
    blocks = blocks.reshape(blocks.shape[0] // 128, 128, -1, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    whole = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    values = (weight / whole).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale_inv": scale}, values.float() * whole


def fp8_channels(weight: Tensor) -> Packed:
    scale = weight.abs().amax(1, keepdim=True) / 448
    values = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def int8(weight: Tensor) -> Packed:
    scale = weight.abs().amax(1, keepdim=True) / 127
    values = (weight / scale).round().to(torch.int8)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def _compressed(kind: str, layout: str, strategy: str = "channel") -> Mapping[str, Any]:
    """The configuration of compressed-tensors with a scale per output (or layer) and, for inputs, per token."""
    numbers = {"num_bits": 8, "type": kind, "symmetric": True}
    weights = {**numbers, "strategy": strategy, "dynamic": False}
    inputs = {**numbers, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    head = {"quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"]}
    return {**head, "config_groups": {"group_0": group}}


FORMATS: Mapping[str, tuple[Callable[[Tensor], Packed], Mapping[str, Any]]] = {
    "AWQ": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "GPTQ": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "FP8": (fp8, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "FP8 in blocks": (
        fp8_blocks,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
    "FP8 (compressed-tensors)": (fp8_channels, _compressed("float", "float-quantized")),
    "FP8 by layer (compressed-tensors)": (fp8, _compressed("float", "float-quantized", "tensor")),
    "INT8 (compressed-tensors)": (int8, _compressed("int", "int-quantized")),
}
"""How a layer is packed, and what the base's configuration says of it."""

UNSERVED = {"FP8", "FP8 by layer (compressed-tensors)", "INT8 (compressed-tensors)"}
"""Formats that vLLM's CPU build cannot compute, with adapters, on this machine."""
if "amx_tile" not in Path("/proc/cpuinfo").read_text():
    UNSERVED.add("FP8 in blocks")


def round_fp8(inputs: Tensor) -> Tensor:
    """What a layer sees of its inputs when they are quantized to FP8, with a scale per token."""
    scale = (inputs.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
    return (inputs / scale).to(torch.float8_e4m3fn).float() * scale


def quantize_base(base: Path, name: str, folder: Path) -> tuple[Path, Path]:
    """`base` in the format `name`, and with the plain weights that its quantized ones stand for."""
    pack, config = FORMATS[name]
    quantized, plain = folder / "quantized", folder / "plain"
    tensors = load_file(base / "model.safetensors")
    packed, restored = dict[str, Tensor](), dict(tensors)
    for key, tensor in tensors.items():
        if key.endswith("_proj.weight"):
            parts, restored[key] = pack(tensor)
            packed |= {f"{key.removesuffix('weight')}{end}": part for end, part in parts.items()}
        else:
            packed[key] = tensor
    for target, content, extra in ((quantized, packed, {"quantization_config": config}), (plain, restored, {})):
        target.mkdir(parents=True)
        for file in base.iterdir():
            if file.suffix == ".json":
                (target / file.name).write_bytes(file.read_bytes())
        settings = json.loads((base / "config.json").read_text()) | extra
        (target / "config.json").write_text(json.dumps(settings))
        save_file(content, target / "model.safetensors", {"format": "pt"})
    return quantized, plain
