"""Whether an adapter acts in the engine: what it does to the log-probabilities of a probe prompt."""

from collections.abc import Sequence
from typing import Protocol

from adapters import AdapterError
from service.engine.models import LoRARequest, mix_request
from service.engine.overflow import AnswerOverflowError
from service.engine.probe import PROMPT, distance, is_finite
from service.engine.slot_waits import SlotsBusyError
from service.errors import ApiError
from service.pool import Pool
from service.resolve import Fusion

EFFECT_OVER_NOISE = 10
"""A probe must move log-probabilities by this many times the difference of two runs of the base."""
_OVERFLOW = (
    "a probe with the adapter gives numbers that are not finite: expected finite log-probabilities; check lora_alpha "
    "and that the training did not diverge"
)


class Prober(Protocol):
    """The part of the engine that shows an adapter's effect."""

    async def probe(self, prompt: Sequence[int], lora: LoRARequest | None) -> list[dict[int, float]]:
        """Log-probabilities of the likeliest tokens after `prompt`, one dict per step."""


async def measure_effect(pool: Pool, engine: Prober, fusion: Fusion, client: str | None, *, required: bool) -> float:
    """Largest log-probability change on a probe prompt, 0 for none; refuses adapters without effect if it is
    `required`.
    """
    async with pool.lease(fusion, client=client) as lease:
        request = mix_request(lease.resident.request, lease.resident.key, lease.weights)
        # One after the other: without the seam, vLLM's CPU kernels let an adapter act on base
        # requests of the same batch.
        try:
            base, adapted, base_again = [await engine.probe(PROMPT, lora) for lora in (None, request, None)]
        except AnswerOverflowError as error:
            raise AdapterError("overflow", _OVERFLOW) from error
        except SlotsBusyError as error:
            raise ApiError(503, str(error)) from error
    if not is_finite(adapted):
        raise AdapterError("overflow", _OVERFLOW)
    noise, effect = distance(base, base_again), distance(base, adapted)
    if not effect > EFFECT_OVER_NOISE * noise:  # also for NaN
        if not required:
            return 0.0
        raise AdapterError(
            "no_effect",
            f"the adapter has no effect: probe log-probabilities moved by {effect:.1e}, two runs of "
            f"the base differ by {noise:.1e}; check that it was trained, and saved after training",
        )
    return effect
