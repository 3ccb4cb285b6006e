"""The optimization of a gate: class-balanced cross-entropy of its value, with AdamW."""

import math
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional

from training.errors import NonFiniteLossError
from training.gates.config import GateConfig
from training.gates.model import GateModel
from training.gates.prefill import Prefill

WARMUP = 0.05
CLIP_NORM = 1.0
Watch = Callable[[int, int, float], None]
"""Gets the step, counted from 1, the number of steps, and the step's loss."""


def fit(model: GateModel, prefill: Prefill, labels: Sequence[bool], config: GateConfig, watch: Watch) -> int:
    """Train the LoRA of `model` in place; the number of steps. `labels` say which prompts are dangerous, one each;
    both kinds count alike, however many there are of each.

    NonFiniteLossError when a loss is not finite.
    """
    parameters = [p for p in model.adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=config.weight_decay)
    targets = torch.tensor(labels, dtype=torch.float32)
    dangerous = float(targets.mean())
    weights = torch.where(targets > 0, 0.5 / dangerous, 0.5 / (1 - dangerous))
    steps = config.epochs * max(1, len(labels) // config.batch_rows)
    torch.manual_seed(config.seed)  # for dropout
    model.adapted.train()
    for step, numbers in enumerate(draw_batches(len(labels), steps, config)):
        for settings in optimizer.param_groups:
            settings["lr"] = config.learning_rate * _anneal(step, steps)
        values = model.measure(prefill, numbers).cpu()
        loss = functional.binary_cross_entropy_with_logits(values, targets[numbers], weight=weights[numbers])
        if not math.isfinite(loss.item()):
            raise NonFiniteLossError(f"the loss of step {step + 1} is {loss.item()}: lower --learning-rate")
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        watch(step + 1, steps, loss.item())
    model.adapted.eval()
    return steps


def draw_batches(count: int, steps: int, config: GateConfig) -> Iterator[list[int]]:
    """Numbers of the prompts of each step: all in a new order each epoch; those that fill no step are left for the
    next epochs.
    """
    rng = random.Random(f"gate/{config.seed}")
    size = min(config.batch_rows, count)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < size:
            order = rng.sample(range(count), count)
        yield [order.pop() for _ in range(size)]


def _anneal(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / (WARMUP * steps))
    return warm * 0.5 * (1 + math.cos(math.pi * step / steps))
