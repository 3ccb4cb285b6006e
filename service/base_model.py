"""The shapes of the base's dense layers, read from its configuration alone."""

from collections.abc import Mapping

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adapters import AdapterError, LoraAdapter, did_you_mean

Shapes = Mapping[str, tuple[int, int]]


def read_dense_shapes(model: str) -> Shapes:
    """(d_out, d_in) of every linear layer but the output head, by the base's own module names."""
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    head = empty.get_output_embeddings()
    return {
        name: (module.out_features, module.in_features)
        for name, module in empty.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def check_fits(adapter: LoraAdapter, shapes: Shapes, names: set[str]) -> None:
    """Raise `AdapterError` unless `adapter` belongs to the base called one of `names` with these shapes."""
    if adapter.base is not None and adapter.base not in names:
        raise AdapterError(
            "base",
            f"the adapter's base is {adapter.base!r}, this server's is "
            f"{' or '.join(sorted(map(repr, names)))}; if they are the same model, add that name to "
            "FUSION_BASE_ALIASES",
        )
    for name, shape in adapter.shapes.items():
        if name not in shapes:
            hint = did_you_mean(name, shapes) or "the adapter was trained on another base"
            raise AdapterError("shape", f"the base has no linear layer {name!r}: {hint}")
        if shapes[name] != shape:
            message = f"{name!r} is {shape}, the base's layer {shapes[name]} (d_out, d_in): it is of another base"
            raise AdapterError("shape", message)
