"""From chat rows to token batches: chat template, loss mask, length buckets."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.orders import orders
from training.recipe import DataConfig, RecipeError

IGNORE = -100
"""Label of a token that carries no loss."""

Pair = tuple[str, str]
"""(prompt, answer)."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as token ids; the last ``answer_length`` of them carry the loss."""

    ids: tuple[int, ...]
    answer_length: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded rows, each tensor int64 of shape [rows, tokens]."""

    ids: Tensor
    attention: Tensor
    labels: Tensor
    """The token itself where it is answer, else IGNORE; not shifted."""


def load_pairs(data: DataConfig, folder: Path) -> list[Pair]:
    """The rows a recipe names; ``folder`` is where relative paths start."""
    if data.source == "orders":
        return [(row.prompt, row.answer) for row in orders(data.rows, seed=data.seed)]
    path = folder / data.path
    if not path.is_file():
        raise RecipeError(f"data.path {data.path!r} is no file (looked in {str(folder)!r})")
    pairs: list[Pair] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RecipeError(f"{path.name} line {number} is not JSON: {error}") from None
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("prompt"), str)
            or not isinstance(row.get("answer"), str)
        ):
            raise RecipeError(f'{path.name} line {number}: expected "prompt" and "answer" strings')
        pairs.append((row["prompt"], row["answer"]))
    if data.rows:
        random.Random(data.seed).shuffle(pairs)
        pairs = pairs[: data.rows]
    return pairs


def encode(tokenizer: Any, pair: Pair, max_tokens: int) -> Encoded:
    """Apply the tokenizer's chat template; the answer runs up to and with the end-of-turn token.

    Raises:
        RecipeError: the row is longer than ``max_tokens``, or the template does not open an
            assistant turn the same way with and without the answer.
    """
    turns = [{"role": "user", "content": pair[0]}]
    head: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole: str = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": pair[1]}], tokenize=False)
    if not whole.startswith(head):
        raise RecipeError("the chat template writes the prompt differently once it is answered")
    prompt_ids: list[int] = tokenizer(head, add_special_tokens=False).input_ids
    tail = whole[len(head) :].rstrip("\n")
    answer_ids: list[int] = tokenizer(tail, add_special_tokens=False).input_ids
    ids = (*prompt_ids, *answer_ids)
    if len(ids) > max_tokens:
        raise RecipeError(f"row {pair[0][:40]!r} has {len(ids)} tokens, over {max_tokens}")
    return Encoded(ids, len(answer_ids))


def collate(rows: Sequence[Encoded], pad: int) -> Batch:
    """Pad rows on the right to the longest of them."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad)
    attention = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE)
    for i, row in enumerate(rows):
        length = len(row.ids)
        ids[i, :length] = torch.tensor(row.ids)
        attention[i, :length] = 1
        labels[i, length - row.answer_length : length] = ids[i, length - row.answer_length : length]
    return Batch(ids, attention, labels)


def batches(rows: Sequence[Encoded], size: int, pad: int, rng: random.Random) -> list[Batch]:
    """One epoch: rows shuffled, near lengths put together, batches shuffled.

    Rows are sorted only inside chunks of 8 batches, so a batch differs from epoch to epoch.
    """
    order = list(rows)
    rng.shuffle(order)
    grouped: list[Batch] = []
    for start in range(0, len(order), 8 * size):
        chunk = sorted(order[start : start + 8 * size], key=lambda row: len(row.ids))
        grouped += [collate(chunk[i : i + size], pad) for i in range(0, len(chunk), size)]
    rng.shuffle(grouped)
    return grouped
