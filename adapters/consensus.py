"""Settle what several sparse updates say about each entry, and add them up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

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
    turned = [update if weight >= 0 else -update for update, weight in zip(updates, weights, strict=True)]
    return _merge(turned, [abs(weight) for weight in weights], majority)


def peft_sign(updates: Sequence[Tensor], weights: Sequence[float], majority: str) -> Tensor:
    """As PEFT: the updates vote before their weights, signs included, are known."""
    return _merge(updates, weights, majority)


def _merge(updates: Sequence[Tensor], weights: Sequence[float], majority: str) -> Tensor:
    votes = torch.zeros_like(updates[0])
    for update in updates:
        votes.add_(update if majority == "total" else update.sign())
    positive = votes >= 0
    total, agreeing = votes.zero_(), torch.zeros_like(votes)
    for update, weight in zip(updates, weights, strict=True):
        agrees = torch.where(positive, update > 0, update < 0)
        total.add_(update * agrees, alpha=weight)
        agreeing.add_(agrees)
    return total.div_(agreeing.clamp_(min=1))


CONSENSUS: Mapping[str, Consensus] = {"none": none, "sign": sign, "peft_sign": peft_sign}
