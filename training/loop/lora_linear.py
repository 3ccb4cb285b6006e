"""Forward and backward of LoRA layers with the additions fused into the matrix products.

PEFT adds an adapter's output to its base layer's in separate passes over the wide tensors, forward and backward; on
CPUs these passes cost more than the adapter's products. Same numbers up to rounding, less memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.errors import ConfigError

NAME = "default"


@dataclass(slots=True)
class AnswerMask:
    """At which tokens of the current pass the adapter acts, for all layers of a model."""

    acts: Tensor | None = None
    """bool batch×tokens; None: at all."""

    def apply(self, low: Tensor) -> Tensor:
        """The adapter's coordinates, …×r, with zeros where it does not act."""
        if self.acts is None:
            return low
        if low.numel() != self.acts.numel() * low.shape[-1]:
            raise ConfigError(
                f"a LoRA layer computes {low.numel() // low.shape[-1]} of the {self.acts.numel()} tokens of a pass, "
                "which lora.answer_only does not support: leave that layer out of lora.targets"
            )
        return low * self.acts.view(*low.shape[:-1], 1)


class LoraLinear(torch.autograd.Function):
    """y = x·Wᵀ + bias + s·(x·Aᵀ)·Bᵀ with W and bias frozen; x …×d_in, W d_out×d_in, A r×d_in, B d_out×r, one dtype.
    Where the mask is 0, y = x·Wᵀ + bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        mask: AnswerMask | None,
    ) -> Tensor:
        """The output, …×d_out."""
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ a.T if mask is None else mask.apply(flat @ a.T)
        out = functional.linear(flat, weight, bias)
        out.addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(flat, weight, a, b, low)
        ctx.scale, ctx.shape, ctx.mask = scale, x.shape, mask and AnswerMask(mask.acts)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B."""
        flat, weight, a, b, low = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        inner = grad @ b if ctx.mask is None else ctx.mask.apply(grad @ b)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(inner, a, alpha=ctx.scale).view(ctx.shape)
        return grad_x, None, None, (inner.T @ flat).mul_(ctx.scale), (grad.T @ low).mul_(ctx.scale), None, None


def fuse_layers(model: nn.Module) -> None:
    """Let PEFT's LoRA linear layers compute with `LoraLinear` where it applies, and as before elsewhere."""
    from peft.tuners.lora import Linear

    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.forward = _fuse_forward(layer, layer.forward)


def mask_layers(model: nn.Module, mask: AnswerMask) -> None:
    """Let PEFT's LoRA layers, and those of `fuse_layers`, act where the mask says; ConfigError as `hook_layers`."""
    for layer in hook_layers(model, mask.apply):
        layer.answer_mask = mask  # for the fused forward, which does not call what has the hook


def hook_layers(model: nn.Module, change: Callable[[Tensor], Tensor]) -> list[Any]:
    """Pass the adapter's coordinates, batch×tokens×r, through `change` in the forward of PEFT's LoRA layers; returns
    the layers. ConfigError for other layers than linear ones, such as embeddings.
    """
    from peft.tuners.lora import LoraLayer

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in layers:
        if NAME not in layer.lora_A:
            raise ConfigError(
                f"an answer-only adapter has linear layers only: leave {name.rpartition('.')[2]!r} out of lora.targets"
            )
        layer.lora_A[NAME].register_forward_hook(lambda _module, _inputs, low: change(low))
    return [layer for _, layer in layers]


def _fuse_forward(layer: Any, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = layer.base_layer
        a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        simple = type(base) is nn.Linear and not (args or kwargs or layer.merged or layer.disable_adapters)
        simple = simple and isinstance(layer.lora_dropout[NAME], nn.Identity)
        simple = simple and not torch.is_autocast_enabled(x.device.type)
        if not simple or not x.dtype == base.weight.dtype == a.dtype == b.dtype:
            return original(x, *args, **kwargs)
        apply: Callable[..., Tensor] = LoraLinear.apply
        return apply(x, base.weight, base.bias, a, b, layer.scaling[NAME], getattr(layer, "answer_mask", None))

    return forward
