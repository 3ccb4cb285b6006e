"""A probe: what one prompt's likeliest next tokens are under an adapter, and how far two probes lie apart."""

import math
from collections.abc import Mapping, Sequence

from vllm.sampling_params import SamplingParams

PROMPT = tuple(range(300, 324))
STEPS = 4
Probe = Sequence[Mapping[int, float]]
"""One mapping per step, the prefill's first: token id → log-probability."""


def probe_sampling(forced: int, logprobs: int) -> SamplingParams:
    """How a probe samples: STEPS greedy tokens held to `forced`, `logprobs` log-probabilities each.

    Held to one token every adapter walks the same path and its steps compare; log-probabilities are the model's
    own, from before that constraint. (Log-probabilities of the prompt would say more, but stock vLLM's CPU kernels
    cannot give them for batches with adapters.)
    """
    return SamplingParams(
        temperature=0.0, max_tokens=STEPS, logprobs=logprobs, allowed_token_ids=[forced], ignore_eos=True
    )


def is_finite(probe: Probe) -> bool:
    """Whether all log-probabilities are finite."""
    return all(math.isfinite(value) for step in probe for value in step.values())


def distance(one: Probe, other: Probe) -> float:
    """Largest difference of two probes' log-probabilities, over the tokens both list."""
    pairs = zip(one, other, strict=True)
    return max(abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys())
