"""The computation of a step: its gradients and losses, whatever the number of processes that share it."""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.config import Config, TrainConfig
from training.errors import NonFiniteLossError
from training.loop.loss import AnswerLoss
from training.loop.model import set_weight
from training.loop.processes import Group, set_gradient_sync
from training.rows.encoding import Row
from training.rows.passes import Pass, is_opening_token, make_passes, row_of_token

MAX_LISTED_ROWS = 8
"""How many rows an error lists before it ends in "…"."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One process's part of a training step; all processes of the group call the same methods together."""

    model: AnswerLoss
    config: Config
    group: Group
    pad: int
    """Token id of padding."""

    def accumulate_gradients(self, rows: Sequence[Row], step: int, scale: float) -> float:
        """Add up the gradients of `scale` times the mean loss over the step's target tokens, weighted by row and by
        train.opening_weight; returns the unweighted mean, nats. `rows` in the order of the data set. NonFiniteLossError
        when that is not finite.
        """
        train, group = self.config.train, self.group
        # Every process plans all passes, so that the mean is over the whole step.
        passes = self._make_passes(rows, share_prefix=self.config.lora.dropout == 0)  # dropout's noise is per row
        weights = [_token_weights(batch, train) for batch in passes]
        total_weight = float(sum(weight.sum() for weight in weights))
        # One weight of the adapter for the whole step.
        set_weight(self.model, random.Random(f"weight/{train.seed}/{step}").uniform(*train.weight_range))
        # Each round, every process computes one pass; gradients are exchanged in the last.
        rounds = math.ceil(len(passes) / group.world_size)
        computed: list[tuple[Pass, Tensor]] = []
        for i in range(rounds):
            index = i * group.world_size + group.rank
            has_work = index < len(passes)  # a process without work still takes part in the exchange
            index = index if has_work else 0
            batch = _move(passes[index], group.device)
            torch.manual_seed(_hash_seed(f"{train.seed}/{step}/{index}"))  # for dropout
            set_gradient_sync(self.model, i + 1 == rounds)
            losses = self.model(batch)
            weighted = (losses * weights[index].to(group.device)).sum()
            # FSDP averages over processes, hence the factor world_size.
            (weighted * (has_work * scale * group.world_size / total_weight)).backward()
            if has_work:
                computed.append((batch, losses.detach()))
        # The unweighted mean, for logging; its rows are named when it is not finite.
        loss = sum(float(losses.double().sum()) for _, losses in computed)
        mean = group.sum([loss])[0] / sum(batch.target_count for batch in passes)
        if not math.isfinite(mean):
            raise self._non_finite_error(mean, step, computed)
        return mean

    @torch.no_grad()
    def evaluate(self, rows: Sequence[Row]) -> float:
        """Mean loss of the target tokens of `rows`, nats, at adapter weight 1."""
        self.model.eval()
        set_weight(self.model, 1.0)
        passes = self._make_passes(rows)
        loss, count = 0.0, 0
        for i in range(math.ceil(len(passes) / self.group.world_size)):
            index = i * self.group.world_size + self.group.rank
            losses = self.model(_move(passes[index if index < len(passes) else 0], self.group.device))
            if index < len(passes):
                loss, count = loss + float(losses.double().sum()), count + losses.numel()
        total, tokens = self.group.sum([loss, count])
        self.model.train()
        return total / tokens

    def _make_passes(self, rows: Sequence[Row], *, share_prefix: bool = True) -> list[Pass]:
        limit, pack = self.config.train.micro_tokens, self.config.train.pack
        return make_passes(rows, limit, self.group.world_size, pack=pack, pad=self.pad, share_prefix=share_prefix)

    def _non_finite_error(self, mean: float, step: int, computed: Sequence[tuple[Pass, Tensor]]) -> NonFiniteLossError:
        """The error that names the rows, of all processes, whose loss is not finite."""
        own = []
        for batch, losses in computed:
            bad = sorted(set(row_of_token(batch)[~losses.isfinite().cpu()].tolist()))
            own += [batch.rows[i].where for i in bad]
        names = [name for gathered in self.group.gather(own) for name in gathered]
        listed = ", ".join([*names[:MAX_LISTED_ROWS], *["…"] * (len(names) > MAX_LISTED_ROWS)])
        return NonFiniteLossError(
            f"the loss of step {step + 1} is {mean}, from {listed}: check these rows, or lower train.learning_rate"
        )


def _token_weights(batch: Pass, train: TrainConfig) -> Tensor:
    """The weight in the loss of each target token, float32: its row's, times opening_weight where an answer begins."""
    openings = 1 + (train.opening_weight - 1) * is_opening_token(batch.labels, train.opening_tokens)
    return openings * torch.tensor([row.weight for row in batch.rows])[row_of_token(batch)]


def _move(batch: Pass, device: torch.device) -> Pass:
    names = ("ids", "positions", "labels", "acts")
    return replace(batch, **{name: getattr(batch, name).to(device) for name in names})


def _hash_seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
