"""The engine's scheduler (`--scheduler-cls`): vLLM's, and it ends the requests that a worker reports as not finite.

Importing it also has the prefix cache tell mixes apart by their weights (see `block_keys`).

Nothing of such a request stays in the prefix cache. vLLM enters full blocks there when it schedules them, before they
are computed, so that another request may share them already; it has the same adapter, weights and prompt, is not
finite itself and ends in the same way.
"""

from typing import TYPE_CHECKING, Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from service.engine import block_keys
from service.engine.overflow import STOP_REASON
from service.engine.runners import zero_new_blocks
from service.engine.supported import require

require(Scheduler, "update_from_output", "finish_requests")
require(KVCacheManager, "get_block_ids")
require(BlockPool, "evict_blocks", "get_cached_block")
zero_new_blocks()
block_keys.install()


class EndOverflows(Scheduler if TYPE_CHECKING else object):  # type: ignore[misc]  # vLLM's comes next in line
    """Mixed into one of vLLM's schedulers."""

    def update_from_output(self, scheduler_output: Any, output: ModelRunnerOutput) -> dict[int, EngineCoreOutputs]:
        """vLLM's, and requests with hidden states that are not finite end with an error and without a token."""
        counts = output.num_nans_in_logits
        if not counts or not any(counts.values()):
            return self._update(scheduler_output, output)
        ids = [id_ for id_, count in counts.items() if count and id_ in self.requests]
        for id_ in ids:
            _drop_results(output, id_)
        outputs = self._update(scheduler_output, output)
        for id_ in ids:
            if id_ in self.requests:
                self._evict(self.requests[id_])
        for request in self.finish_requests(ids, RequestStatus.FINISHED_ERROR):
            output = EngineCoreOutput(
                request.request_id,
                [],
                finish_reason=request.get_finished_reason(),
                stop_reason=STOP_REASON,
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)
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


def _drop_results(output: ModelRunnerOutput, id_: str) -> None:
    """Take what one request has computed in this step out of `output`."""
    if output.sampled_token_ids:
        output.sampled_token_ids[output.req_id_to_index[id_]] = []
    output.prompt_logprobs_dict.pop(id_, None)
    output.prompt_token_id_logprobs_dict.pop(id_, None)


def make_scheduler(**kwargs: Any) -> Scheduler:
    """The scheduler vLLM would take for this configuration, with `EndOverflows` mixed in; vLLM calls it as a class."""
    config = kwargs["vllm_config"].scheduler_config
    config.scheduler_cls = None
    stock = config.get_scheduler_cls()
    scheduler: Scheduler = type(stock.__name__, (EndOverflows, stock), {})(**kwargs)
    return scheduler
