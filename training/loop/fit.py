"""The training loop, the same for one process and many."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from training.config import Config
from training.errors import NonFiniteLossError
from training.loop.checkpoints import Checkpoints, collect_state
from training.loop.gradients import Worker
from training.loop.model import adapter_parameters, set_weight
from training.loop.optimizers import LossScale, learning_rate, make_optimizer
from training.rows.dataset import Dataset
from training.rows.passes import shuffle_epoch

INITIAL_SCALE = 2.0**14
"""The first scale of float16 losses."""

Watch = Callable[[Mapping[str, float]], None]
"""Receives the metrics of every step."""


@dataclass(slots=True)
class Progress:
    """How far a run has come; part of its checkpoints."""

    step: int = 0
    tokens: int = 0
    """Tokens read, prompts included, padding excluded."""
    seconds: float = 0.0
    scale: float = 1.0
    good: int = 0
    """Steps since the scale last changed."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which rows are read at which step."""

    rows: int
    batch_rows: int
    seed: int
    steps_per_epoch: int
    total: int
    """Steps of the whole run."""

    @classmethod
    def from_config(cls, config: Config, rows: int) -> "Schedule":
        """The schedule of a run over `rows` rows."""
        train = config.train
        steps_per_epoch = math.ceil(rows / train.batch_rows)
        total = train.epochs * steps_per_epoch
        if train.max_steps:
            total = min(total, train.max_steps)
        return cls(rows, train.batch_rows, train.seed, steps_per_epoch, total)

    def row_numbers(self, step: int) -> list[int]:
        """The rows of a step, ascending."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return sorted(shuffle_epoch(self.rows, self.batch_rows, self.seed, epoch)[index])


def fit(
    worker: Worker, data: Dataset, checkpoints: Checkpoints, *, watch: Watch | None = None, resume: bool = False
) -> Progress:
    """Train the worker's adapter in place, from the start or the last checkpoint to the end; the last step always has
    a checkpoint. The main process passes the metrics of every step to `watch`.

    NonFiniteLossError when a loss is not finite; OSError when the last checkpoint could not be written.
    """
    config, model = worker.config, worker.model
    parameters = adapter_parameters(model)
    optimizer = make_optimizer(parameters, config)
    schedule = Schedule.from_config(config, len(data.train))
    fp16 = config.policy.precision == "fp16"
    progress = Progress(scale=INITIAL_SCALE if fp16 else 1.0)
    if resume and (steps := checkpoints.steps()):
        progress = Progress(**checkpoints.load(steps[-1], collect_state(parameters, optimizer)))
    scale = LossScale(progress.scale, progress.good, dynamic=fp16)
    model.train()
    start = time.monotonic() - progress.seconds
    for step in range(progress.step, schedule.total):
        rate = learning_rate(config.train, step, schedule.total, schedule.steps_per_epoch)
        rows = [data.train[number] for number in schedule.row_numbers(step)]
        loss = worker.accumulate_gradients(rows, step, scale.value)
        for settings in optimizer.param_groups:
            settings["lr"] = rate
        outcome = _update(optimizer, list(parameters.values()), config.train.clip_norm, scale, step)
        tokens = progress.tokens + sum(len(row.ids) for row in rows)
        progress = Progress(step + 1, tokens, time.monotonic() - start, scale.value, scale.good)
        metrics = {"step": step + 1, "loss": loss, "learning_rate": rate, **outcome, "tokens": tokens}
        metrics["seconds"] = round(progress.seconds, 3)
        last = progress.step == schedule.total
        if data.validation and (last or progress.step % schedule.steps_per_epoch == 0):
            metrics["validation_loss"] = worker.evaluate(data.validation)
        _finish(checkpoints)  # before `watch`, so that a step that was reported is at most `every` past a checkpoint
        if watch and worker.group.is_main:
            watch(metrics)
        if last or (config.checkpoint.every and progress.step % config.checkpoint.every == 0):
            checkpoints.save(progress.step, collect_state(parameters, optimizer), asdict(progress))
    checkpoints.finish()  # the last checkpoint must not fail
    set_weight(model, 1.0)
    model.eval()
    return progress


def _update(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], clip_norm: float, scale: LossScale, step: int
) -> dict[str, float]:
    """Take the optimizer's step, unless its gradients overflowed; what happened, for the metrics."""
    norm = _clip(parameters, clip_norm, scale.value)
    exhausted = scale.exhausted
    if passed := scale.update(norm):
        optimizer.step()
    elif exhausted:
        raise NonFiniteLossError(f"the gradients of step {step + 1} are not finite ({norm}): lower the learning rate")
    optimizer.zero_grad(set_to_none=True)
    return {"gradient_norm": norm} if passed else {"skipped": 1}  # JSON has no infinity


def _clip(parameters: Sequence[nn.Parameter], limit: float, scale: float) -> float:
    """Norm of the gradients over all processes, which are divided by `scale` and clipped to `limit` (0: not)."""
    for parameter in parameters:
        if parameter.grad is not None and scale != 1.0:
            parameter.grad.div_(scale)
    norm: Any = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _finish(checkpoints: Checkpoints) -> None:
    """Finish the pending checkpoint. When it fails, the run goes on without it."""
    try:
        checkpoints.finish()
    except OSError as error:
        if checkpoints.group.is_main:
            print(f"warning: {error}; training continues, earlier checkpoints stay", file=sys.stderr, flush=True)
