"""AdamW, plain or with states in bf16; the learning rate of a step; the scale of float16 losses."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.config import Config, TrainConfig

BETAS, EPS = (0.9, 0.999), 1e-8


class AdamWBf16(torch.optim.Optimizer):
    """AdamW (https://arxiv.org/abs/1711.05101) with both moments in bf16.

    Parameters in bf16 lose small updates to rounding; the rounding error is kept, in bf16 too, and added to the next
    update (Kahan summation).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, self.state[parameter], group["lr"], group["weight_decay"])

    def _update(self, parameter: Tensor, state: dict[str, Tensor], lr: float, decay: float) -> None:
        gradient = parameter.grad
        assert gradient is not None
        gradient = gradient.float()
        state["step"] += 1
        count = float(state["step"])
        first = state["exp_avg"].float().lerp(gradient, 1 - BETAS[0])
        second = state["exp_avg_sq"].float().mul(BETAS[1]).addcmul(gradient, gradient, value=1 - BETAS[1])
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        size = second.sqrt().div(math.sqrt(1 - BETAS[1] ** count)).add(EPS)
        change = first.div(size).mul(-lr / (1 - BETAS[0] ** count)) - parameter.float() * (lr * decay)
        if "lost" not in state:
            parameter.add_(change.to(parameter.dtype))
            return
        updated = parameter.float() + change + state["lost"].float()
        parameter.copy_(updated)
        state["lost"].copy_(updated - parameter.float())


def make_optimizer(parameters: dict[str, nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """The policy's optimizer, its states allocated at once, zero, so that a checkpoint can be read into them."""
    values, decay = list(parameters.values()), config.train.weight_decay
    moments: torch.dtype | None
    if config.policy.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(values, lr=0.0, betas=BETAS, eps=EPS, weight_decay=decay)
        moments = None  # the parameter's own type
    else:
        optimizer, moments = AdamWBf16(values, lr=0.0, weight_decay=decay), torch.bfloat16
    for value in values:
        state = optimizer.state[value]
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(value, dtype=moments)
        state["exp_avg_sq"] = torch.zeros_like(value, dtype=moments)
        if moments is not None and value.dtype == torch.bfloat16:
            state["lost"] = torch.zeros_like(value)
    return optimizer


def learning_rate(config: TrainConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """Rate at step `step` of `steps`, counted from 0: linear warm-up from zero, then the schedule."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1 - share,
        "cosine": 0.5 * (1 + math.cos(math.pi * share)),
        "step": config.decay ** (step // steps_per_epoch),
    }[config.schedule]
    return config.learning_rate * factor


LOWEST_SCALE = 1.0


@dataclass(slots=True)
class LossScale:
    """Dynamic scale of float16 losses: halved, and the step skipped, when a gradient overflows; doubled after
    `growth_interval` good steps. Constant 1, not `dynamic`, for other precisions.
    """

    value: float = 1.0
    good: int = 0
    """Steps since the scale last changed, or the last multiple of `growth_interval`."""
    growth_interval: int = 1000
    dynamic: bool = False

    def update(self, norm: float) -> bool:
        """Adjust the scale to the norm of a step's gradients; whether the step may be taken."""
        if math.isfinite(norm):
            self.good += 1
            if self.dynamic and self.good % self.growth_interval == 0:
                self.value *= 2
            return True
        if self.dynamic:
            self.value, self.good = max(LOWEST_SCALE, self.value / 2), 0
        return False

    @property
    def exhausted(self) -> bool:
        """Whether a lower scale cannot help against gradients that are not finite."""
        return not self.dynamic or self.value <= LOWEST_SCALE
