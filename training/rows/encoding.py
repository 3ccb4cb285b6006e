"""From chats to token rows and from rows to forward passes: chat template, loss mask, packing."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.config import ConfigError
from training.rows.readers import Chat

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama2": (
        "{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{% set ns.system = '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' %}"
        "{% elif m['role'] == 'user' %}{{ bos_token }}[INST] {{ ns.system + m['content'] }} [/INST]"
        "{% set ns.system = '' %}{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
}
"""Chat templates for a base that has none."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One chat as tokens: `ids` int32 and `wanted` bool, both of its length; loss falls on the wanted tokens."""

    ids: NDArray[numpy.int32]
    wanted: NDArray[numpy.bool_]
    where: str
    weight: float = 1.0
    """How much its tokens count in the loss."""

    def cut(self, length: int) -> Row:
        """The first `length` tokens."""
        return replace(self, ids=self.ids[:length], wanted=self.wanted[:length])


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward pass reads. Packed: one line, the `shared` tokens that all its rows begin with once, then
    the rows' own side by side, `lengths` of each. Padded: one row a line, filled up on the right. All tensors int64,
    lines×tokens.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    """The token itself where it is wanted, else IGNORE; not shifted."""
    lengths: tuple[int, ...]
    packed: bool
    rows: tuple[int, ...]
    """Their numbers in the data set."""
    shared: int = 0

    @property
    def wanted(self) -> int:
        """Tokens with a loss."""
        return int((self.labels[:, 1:] != IGNORE).sum())


IGNORE = -100


def owners(batch: Pass) -> Tensor:
    """Which of `batch.rows` each wanted token belongs to: int64 places in them, in the order of the losses."""
    if batch.packed:
        lengths = torch.tensor([batch.shared + batch.lengths[0], *batch.lengths[1:]])  # no loss on what is shared
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
    else:
        owner = torch.arange(len(batch.rows))[:, None].expand(batch.labels.shape)
    return owner[:, 1:][batch.labels[:, 1:].cpu() != IGNORE]


def opening(labels: Tensor, tokens: int) -> Tensor:
    """Which wanted tokens are among the first `tokens` of their answer; bool, in the order of the losses. Labels as
    in a Pass: lines×tokens.
    """
    wanted = labels[:, 1:] != IGNORE
    passed = wanted.cumsum(1)
    before = passed.masked_fill(wanted, 0).cummax(1).values
    return (passed - before <= tokens)[wanted]


def set_template(tokenizer: Any, choice: str) -> None:
    """Give a tokenizer without chat template the chosen one; ConfigError that offers the choice."""
    if not choice:
        if not tokenizer.chat_template:
            raise ConfigError(
                "the base has no chat template: choose how its chats are to be written with model.template = "
                f"{', '.join(map(repr, TEMPLATES))}, or the path of a Jinja file"
            )
        return
    if choice in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[choice]
    elif Path(choice).is_file():
        tokenizer.chat_template = Path(choice).read_text(encoding="utf-8")
    else:
        raise ConfigError(f"model.template is {choice!r}: expected {', '.join(TEMPLATES)} or a file")


def encode(tokenizer: Any, chat: Chat) -> Row:
    """Tokens by the tokenizer's own template; every assistant turn is wanted, up to and with its end.

    ConfigError when the template writes the turns before an answer differently once it is there.
    """
    messages = [{"role": role, "content": content} for role, content in chat.messages]
    ids: list[int] = []
    wanted: list[bool] = []
    done = ""
    for i, (role, _) in enumerate(chat.messages):
        if role != "assistant":
            continue
        try:
            head = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        except (ValueError, jinja2.TemplateError) as error:
            raise ConfigError(f"{chat.where}: the chat template refuses these turns: {error}") from None
        if not (head.startswith(done) and whole.startswith(head)):
            raise ConfigError(
                f"{chat.where}: the chat template writes the turns before an answer differently once it is there"
            )
        end = whole.rstrip("\n")
        before, after = (tokenizer(text, add_special_tokens=False).input_ids for text in (head, end))
        if before[: len(ids)] == ids and after[: len(before)] == before:
            new = (len(before) - len(ids), len(after) - len(before))
            ids = after
        else:  # a token would reach over the end of a prompt, where a served model begins to answer
            parts = [
                tokenizer(text, add_special_tokens=False).input_ids for text in (head[len(done) :], end[len(head) :])
            ]
            new = (len(parts[0]), len(parts[1]))
            ids = [*ids, *parts[0], *parts[1]]
        wanted += [False] * new[0] + [True] * new[1]
        done = end
    return Row(numpy.array(ids, numpy.int32), numpy.array(wanted, bool), chat.where)


def steps(count: int, batch_rows: int, seed: int, epoch: int) -> list[list[int]]:
    """One epoch: every row once, in an order that (seed, epoch) decides, cut into steps."""
    order = list(range(count))
    random.Random(f"epoch/{seed}/{epoch}").shuffle(order)
    return [order[start : start + batch_rows] for start in range(0, count, batch_rows)]


def passes(
    rows: Sequence[Row], numbers: Sequence[int], limit: int, shares: int, *, pack: bool, pad: int, share: bool = True
) -> list[Pass]:
    """The rows of one step as forward passes of at most `limit` tokens (a longer row goes alone), a multiple of
    `shares` unless rows are fewer, of nearly equal size. With `share` packed rows have their common beginning, the
    template's system turn, only once.
    """
    by_size = sorted(numbers, key=lambda number: (-len(rows[number].ids), number))
    if not pack:
        return [_padded(rows, group, pad) for group in _groups(rows, by_size, limit, shares)]
    total = sum(len(rows[number].ids) for number in numbers)
    count = max(1, math.ceil(total / limit))
    while True:
        count = min(len(by_size), math.ceil(count / shares) * shares)
        bins: list[tuple[int, int, list[int]]] = [(0, i, []) for i in range(count)]
        for number in by_size:  # the longest first, each to the emptiest
            size, i, held = bins[0]
            heapq.heapreplace(bins, (size + len(rows[number].ids), i, [*held, number]))
        if max(bins)[0] <= limit or count == len(by_size):
            return [_packed(rows, sorted(held), share) for _, _, held in sorted(bins, key=lambda one: one[1])]
        count += 1


def _groups(rows: Sequence[Row], by_size: Sequence[int], limit: int, shares: int) -> Iterator[list[int]]:
    """Rows of near length, each group within the limit once padded."""
    most = max(1, math.ceil(len(by_size) / shares))
    group: list[int] = []
    for number in by_size:
        if group and ((len(group) + 1) * len(rows[group[0]].ids) > limit or len(group) == most):
            yield group
            group = []
        group.append(number)
    yield group


def _packed(rows: Sequence[Row], numbers: Sequence[int], share: bool) -> Pass:
    chosen = [rows[number] for number in numbers]
    shared = _beginning(chosen) if share else 0
    own = [(row.ids[shared:], row.wanted[shared:]) for row in chosen]
    ids = numpy.concatenate([chosen[0].ids[:shared], *(part for part, _ in own)]).astype(numpy.int64)
    wanted = numpy.concatenate([numpy.zeros(shared, bool), *(part for _, part in own)])
    lengths = tuple(len(part) for part, _ in own)
    positions = torch.cat([torch.arange(shared), *(torch.arange(shared, shared + length) for length in lengths)])
    starts = numpy.cumsum([shared, *lengths[:-1]])
    wanted[starts] = False  # a row's first own token follows the row before
    line = torch.from_numpy(ids)[None]
    labels = torch.where(torch.from_numpy(wanted)[None], line, IGNORE)
    return Pass(line, positions[None], labels, lengths, True, tuple(numbers), shared)


def _beginning(chosen: Sequence[Row]) -> int:
    """How many tokens all rows begin with, ending before the token ahead of the first wanted one of any: what
    predicts a wanted token is a row's own.
    """
    first = chosen[0].ids
    most = min(int(row.wanted.argmax()) - 1 if row.wanted.any() else len(row.ids) - 1 for row in chosen)
    if len(chosen) < 2 or most < 1:
        return 0
    same = numpy.logical_and.reduce([row.ids[:most] == first[:most] for row in chosen])
    return most if same.all() else int(same.argmin())


def _padded(rows: Sequence[Row], numbers: Sequence[int], pad: int) -> Pass:
    lengths = tuple(len(rows[number].ids) for number in numbers)
    ids = torch.full((len(numbers), max(lengths)), pad)
    labels = torch.full_like(ids, IGNORE)
    for i, number in enumerate(numbers):
        row = rows[number]
        ids[i, : lengths[i]] = torch.from_numpy(row.ids.astype(numpy.int64))
        labels[i, : lengths[i]] = torch.where(torch.from_numpy(row.wanted), ids[i, : lengths[i]], IGNORE)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Pass(ids, positions, labels, lengths, False, tuple(numbers))
