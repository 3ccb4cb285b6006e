"""Models that PEFT puts adapters on."""

import peft
import torch
from torch import Tensor, nn

from tests.adapters.samples import SHAPES


class Node(nn.Module):
    """A module that is only there to give its children their names."""

    def prepare_inputs_for_generation(self) -> None:
        """PEFT asks for it in a causal language model."""


def base_model() -> nn.Module:
    """Linear layers under the base's own names."""
    root = Node()
    for name, (d_out, d_in) in SHAPES.items():
        *path, leaf = name.split(".")
        node: nn.Module = root
        for part in path:
            if not hasattr(node, part):
                node.add_module(part, Node())
            node = getattr(node, part)
        node.add_module(leaf, nn.Linear(d_in, d_out, bias=False))
    return root


def peft_deltas(model: nn.Module) -> dict[str, Tensor]:
    """ΔW of every module as PEFT computes it."""
    found = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            found[name.removeprefix("base_model.model.")] = module.get_delta_weight("default").detach().double()
    return found
