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


class Effects:
    """Measures effects in one engine. All methods run on the event loop."""

    def __init__(self, pool: Pool, engine: Prober) -> None:
        self._pool = pool
        self._engine = engine
        self._base: Sequence[dict[int, float]] | None = None
        """The base's last probe: with it a registration needs one run of the base, not two."""

    async def measure(self, fusion: Fusion, client: str | None, *, required: bool) -> float:
        """Largest log-probability change on a probe prompt, 0 for none; refuses adapters without effect if it is
        `required`.
        """
        async with self._pool.lease(fusion, client=client) as lease:
            request = mix_request(lease.resident.request, lease.resident.key, lease.weights)
            try:
                for _ in range(2):  # once more when the base's last probe was made under another load
                    effect, noise = await self._compare(request)
                    if effect > EFFECT_OVER_NOISE * noise:  # not for NaN
                        return effect
            except AnswerOverflowError as error:
                raise AdapterError("overflow", _OVERFLOW) from error
            except SlotsBusyError as error:
                raise ApiError(503, str(error)) from error
        if not required:
            return 0.0
        raise AdapterError(
            "no_effect",
            f"the adapter has no effect: probe log-probabilities moved by {effect:.1e}, two runs of "
            f"the base differ by {noise:.1e}; check that it was trained, and saved after training",
        )

    async def _compare(self, request: LoRARequest) -> tuple[float, float]:
        """How far a probe with the adapter lies from one of the base, and two of the base from each other.

        One after the other: in one batch 16 bits are rounded otherwise, and without the seam vLLM's CPU kernels let an
        adapter act on base requests.
        """
        before = self._base or await self._engine.probe(PROMPT, None)
        adapted = await self._engine.probe(PROMPT, request)
        if not is_finite(adapted):
            raise AdapterError("overflow", _OVERFLOW)
        self._base = base = await self._engine.probe(PROMPT, None)
        return distance(base, adapted), distance(before, base)
