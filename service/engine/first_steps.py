"""First steps without the crowd: a request that has come beside many of another client computes its prompt in a step
that leaves those out.

A step takes as long as all that it computes, and nobody's answer in it comes before its end. So a client with few
requests would wait for the whole step of a client with many, though it goes first. Those that are left out go on in the
next step, of which there is one between any two such steps: at worst they have half of all steps, the longer ones.

Not with asynchronous scheduling, as on GPUs: there the next step is planned before a request comes.
"""

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from service.engine.supported import require

require(Scheduler, "schedule")
require(Request, "num_output_tokens")


def mark(start: int, *, alone: bool = False) -> int:
    """The priority of a request whose client has had `start` tokens: smaller goes first, and of equals what begins
    `alone`.
    """
    return 2 * start + (not alone)


def begins_alone(request: Any) -> bool:
    """Whether a request of the engine was marked so, and has not begun."""
    return request.priority % 2 == 0 and not request.num_output_tokens


class FirstSteps(Scheduler if TYPE_CHECKING else object):  # type: ignore[misc]  # vLLM's comes next in line
    """Mixed into one of vLLM's schedulers."""

    max_num_active_reqs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require(self, "current_step", "max_num_active_reqs", "running", "waiting", "lora_config")
        self.fusion_alone = False
        """Whether the last step left some out."""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's step, which leaves out those that come after one that begins alone."""
        if self.scheduler_config.async_scheduling:
            return super().schedule(*args, **kwargs)
        most = self.max_num_active_reqs
        self.fusion_alone = not self.fusion_alone and self._leave_out()
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self.max_num_active_reqs = most

    def _leave_out(self) -> bool:
        """Have the next step leave out those that come after the first that waits, if that begins alone and can."""
        first = self.waiting.peek_request() if self.waiting else None
        if first is None or not begins_alone(first) or len(self.running) >= self.max_num_active_reqs:
            return False
        after = [request for request in self.running if request.priority > first.priority]
        adapters = {request.lora_request.lora_int_id for request in (*self.running, first) if request.lora_request}
        if not after or len(adapters) > self.lora_config.max_loras:  # who is left out keeps its slot
            return False
        for request in after:
            require(request, "next_decode_eligible_step")
            request.next_decode_eligible_step = self.current_step + 2  # the step that comes is the one after this
        together = sum(begins_alone(request) for request in self.waiting)
        self.max_num_active_reqs = min(self.max_num_active_reqs, len(self.running) + together)
        return True
