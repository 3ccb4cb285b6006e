"""The training loop, the same for one process and many: what a step computes does not depend on their number."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from training.config import Config
from training.loop.checkpoints import Checkpoints, tensors
from training.loop.model import AnswerLoss, adapter_parameters, set_weight
from training.loop.optimizers import LossScale, learning_rate, make_optimizer
from training.loop.processes import Group, sync_gradients
from training.rows.dataset import Dataset
from training.rows.encoding import Pass, Row, opening, owners, passes, steps

FIRST_SCALE = 2.0**14


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite; the message names the rows."""


@dataclass(slots=True)
class Progress:
    """How far a run is."""

    step: int = 0
    tokens: int = 0
    """Read, prompts included, padding not."""
    seconds: float = 0.0
    scale: float = 1.0
    good: int = 0
    """Steps since the scale was changed."""


Watch = Callable[[Mapping[str, float]], None]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which rows are read at which step."""

    rows: int
    batch_rows: int
    seed: int
    per_epoch: int
    total: int

    @staticmethod
    def of(config: Config, rows: int) -> Schedule:
        """That of a run over so many rows."""
        per_epoch = math.ceil(rows / config.train.batch_rows)
        total = config.train.epochs * per_epoch
        if config.train.max_steps:
            total = min(total, config.train.max_steps)
        return Schedule(rows, config.train.batch_rows, config.train.seed, per_epoch, total)

    def numbers(self, step: int) -> list[int]:
        """The rows of a step."""
        epoch, place = divmod(step, self.per_epoch)
        return steps(self.rows, self.batch_rows, self.seed, epoch)[place]


def fit(
    model: AnswerLoss,
    data: Dataset,
    config: Config,
    group: Group,
    checkpoints: Checkpoints,
    *,
    pad: int,
    watch: Watch,
    resume: bool = False,
) -> Progress:
    """Train the adapter in `model` in place, from the start or the last checkpoint, to the end; the last step is
    always in a checkpoint. `watch` is told of every step, by the first process.

    NonFiniteLoss when a loss is not finite; OSError when the last checkpoint could not be written.
    """
    parameters = adapter_parameters(model)
    optimizer = make_optimizer(parameters, config)
    schedule = Schedule.of(config, len(data.train))
    progress = Progress(scale=FIRST_SCALE if config.policy.precision == "fp16" else 1.0)
    if resume and (known := checkpoints.steps()):
        progress = Progress(**checkpoints.load(known[-1], tensors(parameters, optimizer)))
    scale = LossScale(progress.scale, progress.good, dynamic=config.policy.precision == "fp16")
    model.train()
    began, before = time.monotonic(), progress.seconds
    for step in range(progress.step, schedule.total):
        rate = learning_rate(config.train, step, schedule.total, schedule.per_epoch)
        for settings in optimizer.param_groups:
            settings["lr"] = rate
        numbers = schedule.numbers(step)
        loss = _gradients(model, data.train, numbers, step, config, group, scale.value, pad)
        norm = _clip(list(parameters.values()), config.train.clip_norm, scale.value)
        exhausted = scale.exhausted
        if passed := scale.passed(norm):
            optimizer.step()
        elif exhausted:
            raise NonFiniteLoss(f"the gradients of step {step + 1} are not finite ({norm}): lower the learning rate")
        optimizer.zero_grad(set_to_none=True)
        progress = replace(
            progress,
            step=step + 1,
            tokens=progress.tokens + sum(len(data.train[number].ids) for number in numbers),
            seconds=before + time.monotonic() - began,
            scale=scale.value,
            good=scale.good,
        )
        seen = {"step": step + 1, "loss": loss, "learning_rate": rate}
        seen |= {"gradient_norm": norm} if passed else {"skipped": 1}  # a norm that is not finite is no JSON
        seen |= {"tokens": progress.tokens, "seconds": round(progress.seconds, 3)}
        last = step + 1 == schedule.total
        if data.validation and (last or (step + 1) % schedule.per_epoch == 0):
            seen["validation_loss"] = evaluate(model, data.validation, config, group, pad)
        _settle(checkpoints)  # before the step is told of: a step that was seen is never more than the interval ahead
        if group.first:
            watch(seen)
        if last or (config.checkpoint.every and progress.step % config.checkpoint.every == 0):
            checkpoints.save(progress.step, tensors(parameters, optimizer), asdict(progress))
    checkpoints.settle()  # the last one must not fail
    set_weight(model, 1.0)
    model.eval()
    return progress


def _settle(checkpoints: Checkpoints) -> None:
    """End the checkpoint that was begun a step ago. One that fails costs the interval, not the run."""
    try:
        checkpoints.settle()
    except OSError as error:
        if checkpoints.group.first:
            print(f"training: {error}; going on, the checkpoints before stay", flush=True)


def _gradients(
    model: AnswerLoss,
    rows: Sequence[Row],
    numbers: Sequence[int],
    step: int,
    config: Config,
    group: Group,
    scale: float,
    pad: int,
) -> float:
    """Gradients of the mean loss over all wanted tokens of the step, weighted as their rows and train.opening_weight
    say, whoever computes them; returns the plain mean.
    """
    train = config.train
    # With dropout every row draws its own noise for the shared beginning, too.
    share = config.lora.dropout == 0
    todo = passes(rows, numbers, train.micro_tokens, group.world, pack=train.pack, pad=pad, share=share)
    count = sum(one.wanted for one in todo)
    weights = [
        (1 + (train.opening_weight - 1) * opening(one.labels, train.opening_tokens))
        * torch.tensor([rows[number].weight for number in one.rows])[owners(one)]
        for one in todo
    ]
    whole = float(sum(weight.sum() for weight in weights))
    low, high = train.weight_range
    set_weight(model, random.Random(f"weight/{train.seed}/{step}").uniform(low, high))
    rounds = math.ceil(len(todo) / group.world)
    mine: list[tuple[Pass, Tensor]] = []
    for i in range(rounds):
        place = i * group.world + group.rank
        real = place < len(todo)  # a process without work takes part in the others' exchange
        place = place if real else 0
        batch = _moved(todo[place], group.device)
        torch.manual_seed(_seed(f"{train.seed}/{step}/{place}"))  # dropout
        sync_gradients(model, i + 1 == rounds)
        losses = model(batch)
        weighted = (losses * weights[place].to(group.device)).sum()
        (weighted * (real * scale * group.world / whole)).backward()  # FSDP takes the mean over processes
        if real:
            mine.append((batch, losses.detach()))
    total = group.total([sum(float(losses.double().sum()) for _, losses in mine)])[0] / count
    if not math.isfinite(total):
        names = [name for found in group.gather(_culprits(mine, rows)) for name in found]
        raise NonFiniteLoss(
            f"the loss of step {step + 1} is {total}, from {', '.join(names[:8])}{', …' if len(names) > 8 else ''}: "
            "look at these rows, or lower train.learning_rate"
        )
    return total


def _moved(batch: Pass, device: torch.device) -> Pass:
    return replace(
        batch, ids=batch.ids.to(device), positions=batch.positions.to(device), labels=batch.labels.to(device)
    )


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def _culprits(done: Sequence[tuple[Pass, Tensor]], rows: Sequence[Row]) -> list[str]:
    """Where the rows with a loss that is not finite came from."""
    found = []
    for batch, losses in done:
        bad = sorted(set(owners(batch)[~losses.isfinite().cpu()].tolist()))
        found += [rows[batch.rows[i]].where for i in bad]
    return found


def _clip(parameters: Sequence[nn.Parameter], limit: float, scale: float) -> float:
    """Norm of the gradients over all processes, which are scaled back and held to `limit` (0: none)."""
    for parameter in parameters:
        if parameter.grad is not None and scale != 1.0:
            parameter.grad.div_(scale)
    norm: Any = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


@torch.no_grad()
def evaluate(model: AnswerLoss, rows: Sequence[Row], config: Config, group: Group, pad: int) -> float:
    """Mean loss of the wanted tokens of `rows`, nats, at adapter weight 1."""
    model.eval()
    set_weight(model, 1.0)
    train = config.train
    todo = passes(rows, range(len(rows)), train.micro_tokens, group.world, pack=train.pack, pad=pad)
    found = [0.0, 0.0]
    for i in range(math.ceil(len(todo) / group.world)):
        place = i * group.world + group.rank
        losses = model(_moved(todo[place if place < len(todo) else 0], group.device))
        if place < len(todo):
            found = [found[0] + float(losses.double().sum()), found[1] + losses.numel()]
    loss, count = group.total(found)
    model.train()
    return loss / count
