"""How a mix travels to the workers: in the name of its `LoRARequest`.

A stack holds its adapters side by side, adapter i in one fixed coordinate range. All mixes of a stack
share its `lora_int_id` (one slot, one scheduler entry). A mix's name carries its weights to the workers and
keys vLLM's prefix cache, so no blocks are shared between different weights; it identifies nothing else, and
appears in no metric, answer or list.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

HEAD, EMBEDDING, EXPERTS, STACKED_EXPERTS = "output head", "embedding", "experts", "stacked experts"
"""Kinds of layers besides the dense ones, as the workers tell them."""
SERVER_PID = "LORA_FUSION_SERVER_PID"  # environment: the process that the engine's workers end with
SLOT_WAIT_S = "LORA_FUSION_SLOT_WAIT_S"  # environment: how long a request may wait for a slot of the batch
LORA_INFO = "vllm:lora_requests_info"  # vLLM's series of adapters, whose place the service's own takes
PREFIX = "~mix/"  # `~` cannot start a public name, so the two can never meet


def mix_name(stack: str, spans: Sequence[tuple[int, float]]) -> str:
    """Name of a mix: `spans` are (width, weight) of each coordinate range of `stack`, in order."""
    return f"{PREFIX}{stack}/" + ",".join(f"{width}:{weight!r}" for width, weight in spans)


@lru_cache(maxsize=4096)
def weight_row(name: str) -> NDArray[np.float32] | None:
    """Weights of each coordinate, float32 [stack rank]; None when `name` is not a mix (unit weights)."""
    if not name.startswith(PREFIX):
        return None
    spans = [span.split(":") for span in name.rpartition("/")[2].split(",")]
    widths = [int(width) for width, _ in spans]
    return np.repeat(np.array([float(weight) for _, weight in spans], dtype=np.float32), widths)
