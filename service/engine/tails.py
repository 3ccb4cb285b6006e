"""Prompts without their last token in the prefix cache, also where they end inside a block.

vLLM finds full blocks again, so whoever asks a known prompt computes up to a block of it anew. A gate's pass, and the
answer that follows it, differ at the prompt's last position alone. So the block with that position gets one more key:
the tokens before it and the weights at them, as for a full block. Who finds it computes the last position only, in a
copy of the block, which vLLM makes for every hit that ends inside one; this it has for other models, and does not look
for such hits itself.

Only requests whose weights change at the prompt's last position leave this key, and look for it. It goes with its block
as all keys do.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.utils import hashing
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_coordinator import UnitaryKVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request, RequestStatus

from service.engine.supported import require
from service.engine.weights import read_mix

require(Scheduler, "_get_local_prefix_cache_hit", "_free_request")
require(KVCacheManager, "get_blocks", "create_kv_cache_blocks", "prefix_cache_lookup_enabled")
require(BlockPool, "_insert_block_hash", "get_cached_block")
require(FullAttentionManager, "_has_partial_local_hit", "_apply_cow")
require(kv_cache_utils, "generate_block_hash_extra_keys", "hash_block_tokens", "make_block_hash_with_group_id")
require(hashing, "get_hash_fn_by_name")

_COMPUTED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
"""How requests end whose prompts have been computed, and whose numbers are finite."""


@dataclass(frozen=True, slots=True)
class Tails:
    """The ends of prompts in the prefix cache of `manager`, in blocks of `size` tokens."""

    manager: Any
    size: int
    algorithm: str
    """vLLM's name of the hash function of blocks."""

    def extend(self, request: Request, hit: tuple[Any, int, int, bool]) -> tuple[Any, int, int, bool]:
        """vLLM's `hit` of a request, up to the prompt's last position where that is known."""
        blocks, count, *others = hit
        last = request.num_prompt_tokens - 1
        if not 0 < last - count < self.size or not self._is_shared(request):
            return hit
        if not self.manager.prefix_cache_lookup_enabled(request):
            return hit
        tail = self.manager.block_pool.get_cached_block(self._hash(request), [0])
        if tail is None:
            return hit
        return self.manager.create_kv_cache_blocks(([*blocks.blocks[0], *tail],)), last, *others

    def keep(self, request: Request) -> None:
        """Give the block with the prompt's last position its key; `request` still holds it."""
        last = request.num_prompt_tokens - 1
        if request.status not in _COMPUTED or not last % self.size or not self._is_shared(request):
            return
        blocks = self.manager.get_blocks(request.request_id).blocks[0]
        if len(blocks) <= last // self.size:  # it was preempted before its last token came
            return
        key = kv_cache_utils.make_block_hash_with_group_id(self._hash(request), 0)
        self.manager.block_pool._insert_block_hash(key, blocks[last // self.size], num_tokens=last)

    def _is_shared(self, request: Request) -> bool:
        """Whether weights change at the prompt's last position, and the prompt is tokens alone."""
        lora = request.lora_request
        mix = None if lora is None else read_mix(lora.lora_name)
        changes = mix is not None and 0 in mix.starts
        return changes and not request.mm_features and request.prompt_embeds is None

    def _hash(self, request: Request) -> Any:
        last = request.num_prompt_tokens - 1
        start = last // self.size * self.size
        keys, _ = kv_cache_utils.generate_block_hash_extra_keys(request, start, last, 0)
        return kv_cache_utils.hash_block_tokens(
            hashing.get_hash_fn_by_name(self.algorithm),
            request.block_hashes[start // self.size - 1] if start else None,
            request.all_token_ids[start:last],
            keys,
        )


def make_tails(scheduler: Any) -> Tails | None:
    """The tails of a scheduler's prefix cache; None where vLLM would not copy them right or count them."""
    manager, config = scheduler.kv_cache_manager, scheduler.vllm_config
    coordinator, parallel = manager.coordinator, config.parallel_config
    if not manager.enable_caching or not isinstance(coordinator, UnitaryKVCacheCoordinator):
        return None
    if type(coordinator.single_type_managers[0]) is not FullAttentionManager:
        return None  # others free blocks before the request ends
    if scheduler.connector is not None or manager.enable_kv_cache_events or config.speculative_config is not None:
        return None
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return None
    return Tails(manager, scheduler.block_size, config.cache_config.prefix_caching_hash_algo)


class ShareTails(Scheduler if TYPE_CHECKING else object):  # type: ignore[misc]  # vLLM's comes next in line
    """Mixed into one of vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fusion_tails = make_tails(self)

    def _get_local_prefix_cache_hit(self, request: Request, *limit: int | None) -> tuple[Any, int, int, bool]:
        hit: tuple[Any, int, int, bool] = super()._get_local_prefix_cache_hit(request, *limit)
        if self.fusion_tails is None or any(most is not None for most in limit):  # vLLM 0.33 gives one, mostly None
            return hit
        return self.fusion_tails.extend(request, hit)

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        if self.fusion_tails is not None:
            self.fusion_tails.keep(request)
        return super()._free_request(request, delay_free_blocks)
