"""Prompts in parts beside those who are being answered, on CPUs.

On CPUs a step takes longer with every token in it, so that all streams stand still while a prompt is computed whole:
for 45 ms with 65 tokens beside 16 streams whose steps take as long, for most of a second with 1,000. It is divided into
as many parts as there are streams for each prompt that waits, up to `MOST_PARTS` of no fewer than `LEAST_TOKENS`. When
as many wait as are being answered, their prompts are computed at once: nobody has more to lose by waiting.

GPUs compute some hundred tokens in the time of one, and `--max-num-batched-tokens` bounds them there. An operator's own
`--long-prefill-token-threshold` counts instead of this, as vLLM means it.
"""

import math
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from service.engine.supported import require

require(Scheduler, "schedule")
require(Request, "num_tokens", "num_tokens_with_spec")

LEAST_TOKENS = 8
"""Of a part: about what a CPU computes in a sixth of the time in which it reads a model's weights for a step."""
MOST_PARTS = 16


class PromptParts(Scheduler if TYPE_CHECKING else object):  # type: ignore[misc]  # vLLM's comes next in line
    """Mixed into one of vLLM's schedulers."""

    max_num_scheduled_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require(self, "current_step", "max_num_scheduled_tokens", "running", "waiting")
        require(self.scheduler_config, "async_scheduling", "long_prefill_token_threshold")

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's step, with no more than a part of a prompt beside streams."""
        config, most = self.scheduler_config, self.max_num_scheduled_tokens
        if config.async_scheduling or config.long_prefill_token_threshold:
            return super().schedule(*args, **kwargs)
        streams, part = self._divide()
        if part:  # of one prompt, and of all together: those who are being answered get their tokens first
            config.long_prefill_token_threshold = part
            self.max_num_scheduled_tokens = min(most, streams + part)
        try:
            return super().schedule(*args, **kwargs)
        finally:
            config.long_prefill_token_threshold, self.max_num_scheduled_tokens = 0, most

    def _divide(self) -> tuple[int, int]:
        """The tokens of the next step for those who are being answered, and for prompts: 0 for as many as there are."""
        begun = [request for request in self.running if request.is_prefill_chunk]
        streams = [
            request
            for request in self.running  # but for those that the next step leaves out
            if not request.is_prefill_chunk and request.next_decode_eligible_step <= self.current_step + 1
        ]
        count = len(begun) + len(self.waiting)
        if not 0 < count < len(streams):
            return 0, 0
        tokens = sum(request.num_tokens - request.num_computed_tokens for request in (*begun, *self.waiting))
        part = max(LEAST_TOKENS, math.ceil(tokens / min(MOST_PARTS, len(streams) / count)))
        return sum(request.num_tokens_with_spec - request.num_computed_tokens for request in streams), part
