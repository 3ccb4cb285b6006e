"""Merge several sparse updates into one: agree on each entry's sign, and add up."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

BLOCK = 1 << 18
"""Entries merged at a time."""
Consensus = Callable[[Sequence[Tensor], Sequence[float], str], Tensor]


def none(updates: Sequence[Tensor], weights: Sequence[float], majority: str) -> Tensor:
    """Σ w·update."""
    total = updates[0] * weights[0]
    for update, weight in zip(updates[1:], weights[1:], strict=True):
        total.add_(update, alpha=weight)
    return total


def sign(updates: Sequence[Tensor], weights: Sequence[float], majority: str) -> Tensor:
    """TIES: per entry, elect a sign, then the mean of the weighted entries that have it.

    `majority` "total" elects by the sum of the entries, "frequency" by the sum of their signs; a tie is
    positive. An update of negative weight votes with its sign turned.
    """
    return _blockwise(updates, weights, [math.copysign(1.0, weight) for weight in weights], majority)


def peft_sign(updates: Sequence[Tensor], weights: Sequence[float], majority: str) -> Tensor:
    """As PEFT: the updates vote before their weights, signs included, are known."""
    return _blockwise(updates, weights, [1.0] * len(weights), majority)


def _blockwise(updates: Sequence[Tensor], weights: Sequence[float], turns: Sequence[float], majority: str) -> Tensor:
    """Blocks of rows at a time, so that the many passes run in the processor's cache."""
    rows = max(1, BLOCK // max(1, updates[0][0].numel()))
    merged = torch.empty_like(updates[0])
    for start in range(0, len(merged), rows):
        block = [update[start : start + rows] for update in updates]
        merged[start : start + rows] = _merge(block, weights, turns, majority)
    return merged


def _merge(updates: Sequence[Tensor], weights: Sequence[float], turns: Sequence[float], majority: str) -> Tensor:
    votes = torch.zeros_like(updates[0])
    for update, turn in zip(updates, turns, strict=True):
        votes.add_(update if majority == "total" else update.sign(), alpha=turn)
    elected = torch.copysign(torch.ones_like(votes), votes)  # a sum of opposites is +0
    total, agreeing = torch.zeros_like(votes), torch.zeros_like(votes)
    for update, weight, turn in zip(updates, weights, turns, strict=True):
        agrees = (update * elected).mul_(turn) > 0
        total.add_(update * agrees, alpha=weight)
        agreeing.add_(agrees)
    return total.div_(agreeing.clamp_(min=1))


CONSENSUS: Mapping[str, Consensus] = {"none": none, "sign": sign, "peft_sign": peft_sign}
