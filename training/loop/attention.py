"""Attention that keeps packed rows apart, for transformers' attention interface."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.errors import ConfigError

ATTENTION_NAME = "packed_rows"
"""What transformers calls this attention."""
MAX_MASKED_TOKENS = 4096
"""On GPUs, packed sequences up to this length take one masked attention call, since one call per row would leave the
GPU idle between them; CPUs are faster when they do not compute what the mask hides."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    row_lengths: tuple[int, ...] | None = None,
    shared: int = 0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row of a packed sequence, whose rows all see the first `shared` tokens too.

    Without `row_lengths` every sequence is one row, and padding on the right needs no mask. `query`, `key` and `value`
    are batch×heads×tokens×width; the result is batch×tokens×heads×width. ConfigError for a base whose attention does
    more than this.
    """
    # Reject attention features not computed here.
    if unknown := sorted(name for name in ("softcap", "s_aux") if options.get(name) is not None):
        raise ConfigError(
            f"the base's attention uses {unknown[0]}, which training does not support; choose another base"
        )
    lengths = (shared, *(row_lengths if row_lengths is not None else [query.shape[2]]))
    window = options.get("sliding_window")
    if window is not None and (longest := shared + max(lengths[1:])) > window:
        raise ConfigError(
            f"the base's attention window is {window} tokens, but a row has {longest}: set data.max_tokens = {window}"
        )
    # One masked call for short sequences on GPUs.
    if query.is_cuda and len(lengths) > 2 and sum(lengths) <= MAX_MASKED_TOKENS:
        return attend_masked(query, key, value, make_mask(lengths, query.device), scaling, dropout), None
    # Otherwise one causal call per row, each with the shared tokens in front; only the first keeps their output.
    # Computing them again is faster than a masked call without them.
    (prefix, *rows) = zip(*(torch.split(x, list(lengths), 2) for x in (query, key, value)), strict=True)
    outputs: list[Tensor] = []
    for row in rows:
        q, k, v = (torch.cat(pair, 2) for pair in zip(prefix, row, strict=True)) if shared else row
        output = functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        outputs.append(output[:, :, shared:] if outputs else output)
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def attend_masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention in one call; shapes as in `attend`, `mask` bool tokens×tokens. Keys and values that several queries
    share are repeated, since no kernel that takes a mask does so itself.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    output = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return output.transpose(1, 2).contiguous()


@lru_cache(maxsize=2)
def make_mask(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Which tokens of a packed sequence attend to which, bool tokens×tokens: earlier ones of the same row and of the
    first, shared one. Cached, since every layer asks for the same mask.
    """
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    return ((row[:, None] == row) | (row == 0)).tril_()
