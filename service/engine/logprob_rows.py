"""Log-probabilities of requests that are sampled together, on the V1 runner.

Some want those of the likeliest tokens, others, as gates, those of certain tokens. vLLM's sampler gives a whole step
one of the two: beside a gate, whoever wants the likeliest gets the sampled token's and minus infinity for the rest.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.sampler import Sampler

from service.engine.supported import require

require(Sampler, "forward", "gather_logprobs", "gather_specific_token_logprobs")
require(LogprobsTensors, "logprob_token_ids", "logprobs", "selected_token_ranks")


def merge(top: LogprobsTensors, some: LogprobsTensors, rows: Iterable[int]) -> LogprobsTensors:
    """`top` [requests, 1 + likeliest tokens], but of `rows` what `some` [requests, 1 + tokens] has; minus infinity
    where a row has fewer columns than others.
    """
    wide = max(top.logprobs.shape[1], some.logprobs.shape[1])
    chosen = torch.tensor(sorted(rows), device=top.logprobs.device)

    def fill(one: torch.Tensor, other: torch.Tensor, value: float) -> torch.Tensor:
        merged = torch.nn.functional.pad(one, (0, wide - one.shape[1]), value=value)
        merged[chosen] = torch.nn.functional.pad(other[chosen], (0, wide - other.shape[1]), value=value).to(one.dtype)
        return merged

    ids = fill(top.logprob_token_ids, some.logprob_token_ids, 0)
    return LogprobsTensors(ids, fill(top.logprobs, some.logprobs, -torch.inf), top.selected_token_ranks)


def install() -> None:
    """Have vLLM's sampler give each request what it wants."""
    stock: Callable[..., Any] = Sampler.forward

    def forward(self: Any, logits: torch.Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        rows = sampling_metadata.logprob_token_ids
        if not rows or sampling_metadata.max_num_logprobs is None:
            return stock(self, logits, sampling_metadata, *args, **kwargs)
        found = list[LogprobsTensors]()

        def gather(*values: Any, **options: Any) -> LogprobsTensors:
            found.append(type(self).gather_logprobs(*values, **options))
            return found[-1]

        self.gather_logprobs = gather
        try:
            output = stock(self, logits, sampling_metadata, *args, **kwargs)
        finally:
            del self.gather_logprobs
        if found:
            output.logprobs_tensors = merge(found[0], output.logprobs_tensors, rows)
        return output

    Sampler.forward = forward
