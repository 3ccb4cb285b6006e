"""What the base computes of prompts before a gate acts: the keys and values of all positions but the last."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.errors import ConfigError
from training.gates.prompts import Prompt

MAX_BYTES = 8 << 30
MAX_TOKENS = 1024
"""Tokens of a forward pass."""
KeysValues = list[tuple[Tensor, Tensor]]
"""By layer, each batch×heads×tokens×width."""


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """Keys and values of prompts: of the tokens that all begin with, once, and of the rest, without the last one."""

    prefix: KeysValues
    """Of the shared tokens, batch 1, in the base's dtype; empty when nothing is shared."""
    own: list[Tensor]
    """Of each prompt: layers×2×heads×tokens×width, float16, on the CPU."""
    last: Tensor
    """The last token of each prompt, int64."""
    shared: int

    def make_cache(self, numbers: Sequence[int], device: torch.device) -> tuple[Any, Tensor, Tensor]:
        """(the cache of these prompts, padded on the left of their own tokens; attention mask batch×(tokens + 1);
        position of the last token, batch×1).
        """
        from transformers import DynamicCache

        own = [self.own[number] for number in numbers]
        counts = torch.tensor([one.shape[3] for one in own])
        longest = int(counts.max())
        layers, pair, heads, _, width = own[0].shape
        padded = torch.zeros(len(own), layers, pair, heads, longest, width, dtype=own[0].dtype)
        for row, one in zip(padded, own, strict=True):
            row[..., longest - one.shape[3] :, :] = one
        cache = DynamicCache()
        for layer in range(layers):
            keys, values = padded[:, layer].to(device, torch.float32).unbind(1)
            if self.prefix:
                shared = (part.expand(len(own), -1, -1, -1) for part in self.prefix[layer])
                keys, values = (torch.cat(parts, 2) for parts in zip(shared, (keys, values), strict=True))
            cache.update(keys, values, layer)
        mask = torch.ones(len(own), self.shared + longest + 1, dtype=torch.long)
        mask[:, self.shared : -1] = torch.arange(longest) >= longest - counts[:, None]
        return cache, mask.to(device), (self.shared + counts)[:, None].to(device)


def prefill(causal: Any, prompts: Sequence[Prompt], watch: Callable[[int], None] = lambda count: None) -> Prefill:
    """Run the base over all prompts, in passes of equal lengths, without padding; `watch` gets the number of prompts
    of each pass. ConfigError when there are too many tokens to keep, or numbers beyond float16.
    """
    shared = count_shared(prompts)
    rows = [torch.from_numpy(prompt.ids).long() for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    own: list[Tensor] = [torch.empty(0)] * len(rows)
    with torch.no_grad():
        prefix = _forward(causal, rows[0][None, :shared], []) if shared else []
        while order:
            length = len(rows[order[0]])
            most = max(1, MAX_TOKENS // (length - shared))
            numbers = [number for number in order[:most] if len(rows[number]) == length]
            order = order[len(numbers) :]
            layers = _forward(causal, torch.stack([rows[number][shared:-1] for number in numbers]), prefix)
            stacked = torch.stack([torch.stack([k[:, :, shared:], v[:, :, shared:]], 1) for k, v in layers], 1)
            if not stacked.abs().max() <= torch.finfo(torch.float16).max:
                raise ConfigError("the base's keys or values do not fit into float16: choose another base")
            _check_size(stacked, len(numbers), rows, shared)
            for number, one in zip(numbers, stacked.half().cpu(), strict=True):
                own[number] = one.clone()
            watch(len(numbers))
    return Prefill(prefix, own, torch.stack([row[-1] for row in rows]), shared)


def count_shared(prompts: Sequence[Prompt]) -> int:
    """How many tokens all prompts begin with, at least two short of the shortest."""
    first, least = prompts[0].ids, min(len(prompt.ids) for prompt in prompts)
    if least < 2:
        raise ConfigError("a prompt has one token: expected two or more")
    count = least - 2
    for prompt in prompts:
        differs = (prompt.ids[:count] != first[:count]).nonzero()[0]
        count = int(differs[0]) if len(differs) else count
    return count


def _forward(causal: Any, ids: Tensor, before: KeysValues) -> KeysValues:
    """Keys and values of all layers after `ids`, batch×tokens, those of `before` included."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, parts in enumerate(before):
        cache.update(*(part.expand(len(ids), -1, -1, -1) for part in parts), layer)
    causal.base_model(input_ids=ids.to(causal.device), past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _check_size(stacked: Tensor, count: int, rows: Sequence[Tensor], shared: int) -> None:
    per_token = stacked[0].numel() // stacked.shape[4] * 2
    size = per_token * sum(len(row) - shared - 1 for row in rows)
    if size > MAX_BYTES:
        raise ConfigError(
            f"the keys and values of {len(rows)} prompts take {size >> 20} MiB: expected at most {MAX_BYTES >> 20}; "
            "train on fewer rows, with --rows"
        )
