"""What tells key-value blocks apart in the prefix cache: the weights that acted at their positions, and nothing else.

vLLM's key of a block has the adapter's name, which for a mix holds its whole function, the same in every block. Here a
block of a mix has the weights of its own positions: mixes that say the same there share it, and where no weight acts
it is the base's. The weights at earlier positions are in the hash of the block before. When an answer comes back as a
part of the next prompt, other weights act at its positions, and its blocks are not reused.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.v1.core import block_pool, kv_cache_utils

from service.engine.supported import require
from service.engine.weights import read_mix

_NAME = "generate_block_hash_extra_keys"
Keys = tuple[Any, ...] | None
Generate = Callable[[Any, int, int, int], tuple[Keys, int]]


def key_by_weights(generate: Generate) -> Generate:
    """vLLM's `generate_block_hash_extra_keys`, with a mix's weights at the block's positions in place of its name."""

    @wraps(generate)
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[Keys, int]:
        keys, next_mm_idx = generate(request, start_token_idx, end_token_idx, start_mm_idx)
        lora = request.lora_request
        mix = None if lora is None else read_mix(lora.lora_name)
        if mix is None:
            return keys, next_mm_idx
        stock = ("lora", lora.lora_name, lora.lora_path)
        assert keys is not None
        assert keys.count(stock) == 1, "vLLM's keys have another form"
        key = mix.key(start_token_idx, end_token_idx, request.num_prompt_tokens)
        own = () if key is None else (("lora", key, lora.lora_path),)
        return (own + tuple(k for k in keys if k != stock)) or None, next_mm_idx

    return generate_block_hash_extra_keys


def install() -> None:
    """Replace vLLM's function where it is defined and wherever it has been imported by name; once in a process."""
    for owner in (kv_cache_utils, block_pool):
        require(owner, _NAME)
    stock = getattr(kv_cache_utils, _NAME)
    if hasattr(stock, "__wrapped__"):
        return
    own = key_by_weights(stock)
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and getattr(module, _NAME, None) is stock:
            setattr(module, _NAME, own)
