"""The engine's scheduler (`--scheduler-cls`): vLLM's, and it ends the requests that a worker reports as not finite,
and those that have waited for a slot for too long. Some begin in a step without others (see `first_steps`), and on CPUs
prompts are computed in parts (see `prompt_parts`).

Importing it also has the prefix cache tell mixes apart by their weights (see `block_keys`), and find prompts again up
to their last position (see `tails`).

Nothing of such a request stays in the prefix cache. vLLM enters full blocks there when it schedules them, before they
are computed, so that another request may share them already; it has the same adapter, weights and prompt, is not
finite itself and ends in the same way.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from service.engine import block_keys, overflow, slot_waits
from service.engine.first_steps import FirstSteps
from service.engine.prompt_parts import PromptParts
from service.engine.runners import zero_new_blocks
from service.engine.supported import require
from service.engine.tails import ShareTails

require(Scheduler, "update_from_output", "finish_requests")
require(Request, "num_output_tokens")
require(KVCacheManager, "get_block_ids")
require(BlockPool, "evict_blocks", "get_cached_block")
zero_new_blocks()
block_keys.install()


class EndOverflows(Scheduler if TYPE_CHECKING else object):  # type: ignore[misc]  # vLLM's comes next in line
    """Mixed into one of vLLM's schedulers."""

    fusion_slot_waits: slot_waits.SlotWaits

    def update_from_output(self, scheduler_output: Any, output: ModelRunnerOutput) -> dict[int, EngineCoreOutputs]:
        """vLLM's, and requests whose numbers are not finite end with an error and without a token."""
        ids = [id_ for id_ in find_overflows(output) if id_ in self.requests]
        for id_ in ids:
            _drop_results(output, id_)
        outputs = self._update(scheduler_output, output)
        for id_ in ids:
            if id_ in self.requests:
                self._evict(self.requests[id_])
        late = self.fusion_slot_waits.find_late(self.running, self.waiting, self.lora_config.max_loras)
        for reason, ended in ((overflow.STOP_REASON, ids), (slot_waits.STOP_REASON, late)):
            for request in self.finish_requests(ended, RequestStatus.FINISHED_ERROR) if ended else ():
                add_end(outputs, request, reason)
        return outputs

    def _update(self, scheduler_output: Any, output: ModelRunnerOutput) -> dict[int, EngineCoreOutputs]:
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, output)
        return outputs

    def _evict(self, request: Request) -> None:
        """Take out of the prefix cache what `request` holds, and all under its hashes: the blocks it had before it was
        preempted, and equal ones of other requests.
        """
        pool = self.kv_cache_manager.block_pool
        groups = self.kv_cache_manager.get_block_ids(request.request_id)
        pool.evict_blocks({block for group in groups for block in group})
        for group in range(len(groups)):
            for block_hash in request.block_hashes:
                while cached := pool.get_cached_block(block_hash, [group]):
                    pool.evict_blocks({block.block_id for block in cached})


def add_end(outputs: dict[int, EngineCoreOutputs], request: Request, reason: str) -> None:
    """Have `outputs` tell the client of a request, which has ended in an error, for what reason."""
    output = EngineCoreOutput(
        request.request_id,
        [],
        finish_reason=request.get_finished_reason(),
        stop_reason=reason,
        events=request.take_events(),
        trace_headers=request.trace_headers,
    )
    outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)


def find_overflows(output: ModelRunnerOutput) -> set[str]:
    """The requests with hidden states, logits or scores of their prompts that are not finite."""
    ids = {id_ for id_, count in (output.num_nans_in_logits or {}).items() if count}
    return ids.union(
        id_ for id_, scores in output.prompt_logprobs_dict.items() if scores and _overflow(scores.logprobs)
    )


def _overflow(scores: torch.Tensor) -> bool:
    """Whether `scores` [tokens, 1 + alternatives] come from logits that overflow: each is NaN or minus infinity then.

    The first is the prompt's own token, which no mask forbids.
    """
    return bool(scores.isnan().any() | scores[:, :1].isinf().any())


def _drop_results(output: ModelRunnerOutput, id_: str) -> None:
    """Take what one request has computed in this step out of `output`."""
    if output.sampled_token_ids:
        output.sampled_token_ids[output.req_id_to_index[id_]] = []
    output.prompt_logprobs_dict.pop(id_, None)
    output.prompt_token_id_logprobs_dict.pop(id_, None)


def make_scheduler(**kwargs: Any) -> Scheduler:
    """The scheduler vLLM would take for this configuration, with our parts mixed in; vLLM calls it as a class."""
    config = kwargs["vllm_config"].scheduler_config
    config.scheduler_cls = None
    stock = config.get_scheduler_cls()
    parts = (PromptParts,) if current_platform.is_cpu() else ()
    scheduler: Any = type(stock.__name__, (EndOverflows, FirstSteps, *parts, ShareTails, stock), {})(**kwargs)
    scheduler.fusion_slot_waits = slot_waits.SlotWaits(slot_waits.read_limit())
    return scheduler
