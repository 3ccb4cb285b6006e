"""Requests that wait for a slot of the engine's batch: they end when their time is over, since nobody is preempted.

The scheduler, in the engine's process, knows who waits for a slot; the server turns that end into HTTP 503.
"""

import os
import time
from collections.abc import Iterable
from typing import Any

from vllm.exceptions import RetryableRequestError

from service.engine.names import SLOT_WAIT_S

STOP_REASON = "fusion-slot-wait"
"""The stop reason, on the way from the engine to the server, of a request that has waited for too long."""
PERIOD_S = 0.5
"""How often those who wait are looked at."""


class SlotsBusyError(RetryableRequestError):
    """A request got no slot in time. vLLM answers its base class with 503 and the message."""

    def __init__(self) -> None:
        super().__init__(
            f"Other stacks and builds had all slots of the engine's batch (FUSION_MAX_LORAS) for {read_limit():g} s; "
            "try again later."
        )


class SlotWaits:
    """Since when each request has waited for a slot."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since: dict[str, float] = {}
        self._next = 0.0

    def find_late(self, running: Iterable[Any], waiting: Iterable[Any], slots: int) -> list[str]:
        """The ids of vLLM's requests in `waiting` that have waited for one of the `slots` for too long, those among
        them that were preempted within their answer; those in `running` have them.
        """
        now = time.monotonic()
        if now < self._next:
            return []
        self._next = now + PERIOD_S
        adapters = {request.lora_request.lora_int_id for request in running if request.lora_request}
        wanted = {request.request_id: request.lora_request.lora_int_id for request in waiting if request.lora_request}
        blocked = {id_ for id_, adapter in wanted.items() if len(adapters) >= slots and adapter not in adapters}
        self._since = {id_: self._since.get(id_, now) for id_ in wanted if id_ in blocked or id_ in self._since}
        return [id_ for id_ in blocked if now - self._since[id_] >= self._limit_s]


def read_limit() -> float:
    """How long a request may wait, in seconds, as the server has told this process."""
    return float(os.environ.get(SLOT_WAIT_S, "inf"))
