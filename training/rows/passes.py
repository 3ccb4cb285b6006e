"""From token rows to forward passes: the order of an epoch, packing and padding."""

import heapq
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.rows.encoding import Row

IGNORE = -100
"""Label of tokens without a loss."""


@dataclass(frozen=True, slots=True)
class Pass:
    """The input of one forward pass. Packed: one sequence, the `shared` tokens that all its rows begin with once, then
    the rest of each row side by side, `lengths` of each. Padded: one row per sequence, padded on the right. All tensors
    are batch×tokens, int64 unless said.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    """The token itself where it is a target, otherwise IGNORE; not shifted."""
    acts: Tensor
    """Where an answer-only adapter acts, bool: from the token that predicts a row's first target on."""
    lengths: tuple[int, ...]
    packed: bool
    rows: tuple[Row, ...]
    shared: int = 0

    @property
    def target_count(self) -> int:
        """Number of tokens with a loss."""
        return int((self.labels[:, 1:] != IGNORE).sum())


def row_of_token(batch: Pass) -> Tensor:
    """Index into `batch.rows` of each target token, int64, in the order of the losses."""
    if batch.packed:
        lengths = torch.tensor([batch.shared + batch.lengths[0], *batch.lengths[1:]])  # no loss on what is shared
        rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
    else:
        rows = torch.arange(len(batch.rows))[:, None].expand(batch.labels.shape)
    return rows[:, 1:][batch.labels[:, 1:].cpu() != IGNORE]


def is_opening_token(labels: Tensor, tokens: int) -> Tensor:
    """Whether each target token is among the first `tokens` of its answer; bool, in the order of the losses. `labels`
    as in a Pass.
    """
    is_target = labels[:, 1:] != IGNORE
    count = is_target.cumsum(1)
    count_before_answer = count.masked_fill(is_target, 0).cummax(1).values
    return (count - count_before_answer <= tokens)[is_target]


def shuffle_epoch(count: int, batch_rows: int, seed: int, epoch: int) -> list[list[int]]:
    """Row numbers of each step of one epoch: every row once, in an order that (seed, epoch) determines."""
    order = list(range(count))
    random.Random(f"epoch/{seed}/{epoch}").shuffle(order)
    return [order[start : start + batch_rows] for start in range(0, count, batch_rows)]


def make_passes(
    rows: Sequence[Row], max_tokens: int, world_size: int = 1, *, pack: bool, pad: int, share_prefix: bool = True
) -> list[Pass]:
    """The rows of one step as forward passes of nearly equal size, each up to `max_tokens` (a longer row goes alone).

    Packed passes are a multiple of `world_size`, unless there are fewer rows, so that no process is idle; with
    `share_prefix` their rows' common beginning, the template's system turn, is computed once. Padding is token `pad`.
    """
    by_length = sorted(enumerate(rows), key=lambda item: -len(item[1].ids))
    if not pack:
        return [_pad(group, pad) for group in _group([row for _, row in by_length], max_tokens, world_size)]
    count = max(1, math.ceil(sum(len(row.ids) for row in rows) / max_tokens))
    while True:
        count = min(len(rows), math.ceil(count / world_size) * world_size)
        # Each row, the longest first, goes to the emptiest bin: (tokens, number, rows with their place).
        bins: list[tuple[int, int, list[tuple[int, Row]]]] = [(0, i, []) for i in range(count)]
        for item in by_length:
            tokens, i, items = bins[0]
            heapq.heapreplace(bins, (tokens + len(item[1].ids), i, [*items, item]))
        if max(bins)[0] <= max_tokens or count == len(rows):
            bins.sort(key=lambda one: one[1])
            return [_pack([row for _, row in sorted(items)], share_prefix) for _, _, items in bins]
        count += 1


def _group(by_length: Sequence[Row], max_tokens: int, world_size: int) -> Iterator[list[Row]]:
    """Rows of similar length, each group within the limit once padded."""
    most = max(1, math.ceil(len(by_length) / world_size))
    group: list[Row] = []
    for row in by_length:
        if group and ((len(group) + 1) * len(group[0].ids) > max_tokens or len(group) == most):
            yield group
            group = []
        group.append(row)
    yield group


def _pack(rows: Sequence[Row], share_prefix: bool) -> Pass:
    shared = _common_prefix(rows) if share_prefix else 0
    lengths = tuple(len(row.ids) - shared for row in rows)
    ids = np.concatenate([rows[0].ids[:shared], *(row.ids[shared:] for row in rows)]).astype(np.int64)
    is_target = np.concatenate([np.zeros(shared, bool), *(row.is_target[shared:] for row in rows)])
    is_target[np.cumsum([shared, *lengths[:-1]])] = False  # the token before a row's first own one is another row's
    positions = torch.cat([torch.arange(shared), *(torch.arange(shared, shared + length) for length in lengths)])
    acts = torch.cat([torch.zeros(shared, dtype=torch.bool), *(torch.from_numpy(row.acts[shared:]) for row in rows)])
    line = torch.from_numpy(ids)[None]
    labels = torch.where(torch.from_numpy(is_target)[None], line, IGNORE)
    return Pass(line, positions[None], labels, acts[None], lengths, True, tuple(rows), shared)


def _common_prefix(rows: Sequence[Row]) -> int:
    """How many tokens all rows begin with, ending before the token ahead of the first target of any: what
    predicts a target token is a row's own.
    """
    first = rows[0].ids
    most = min(int(row.is_target.argmax()) - 1 if row.is_target.any() else len(row.ids) - 1 for row in rows)
    if len(rows) < 2 or most < 1:
        return 0
    same = np.logical_and.reduce([row.ids[:most] == first[:most] for row in rows])
    return most if same.all() else int(same.argmin())


def _pad(rows: Sequence[Row], pad: int) -> Pass:
    lengths = tuple(len(row.ids) for row in rows)
    ids = torch.full((len(rows), max(lengths)), pad)
    labels = torch.full_like(ids, IGNORE)
    acts = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : lengths[i]] = torch.from_numpy(row.ids.astype(np.int64))
        labels[i, : lengths[i]] = torch.where(torch.from_numpy(row.is_target), ids[i, : lengths[i]], IGNORE)
        acts[i, : lengths[i]] = torch.from_numpy(row.acts)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Pass(ids, positions, labels, acts, lengths, False, tuple(rows))
