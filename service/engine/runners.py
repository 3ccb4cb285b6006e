"""Model runners: nothing that a request computed may be read by another.

Two things, in every worker and on every step. Key-value blocks are zeroed when a request gets them: attention
multiplies the rows of a block that are not in use by zero, and what another request has left there may be NaN. And
requests with hidden states or logits that are not finite are reported, in the field that vLLM has for NaN logits; the
scheduler ends them (see `scheduler`). Such hidden states become zeros first, so that sampling and log-probabilities see
numbers. Logits can overflow where hidden states do not, in float16 above all; of them only the rows that a token is
sampled from are looked at, before anything is masked.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig

from service.engine import logprob_rows
from service.engine.seeds import patch_cpu_seeds
from service.engine.supported import require


def clear_nonfinite(hidden: torch.Tensor) -> torch.Tensor:
    """Set rows of `hidden` [tokens, d] that hold NaN or infinite numbers to 0; bool [tokens], true for those.

    A sum in float32 is finite only when every term is. Nothing waits for the device here.
    """
    bad = torch.isfinite(hidden.sum(-1, dtype=torch.float32)).logical_not_()
    if hidden.device.type != "cpu" or bool(bad.any()):
        hidden.masked_fill_(bad[:, None], 0.0)
    return bad


def find_overflows(logits: torch.Tensor) -> torch.Tensor:
    """Rows of `logits` [rows, vocabulary] with NaN or plus infinity, bool [rows]; minus infinity masks a token."""
    return (logits.amax(-1) < torch.inf).logical_not_()


def count_by_request(bad: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """How many of each request's rows are `bad`, int32 [requests]; `starts` [requests + 1] has where each begins."""
    before = torch.nn.functional.pad(bad.cumsum(0, dtype=torch.int32), (1, 0))
    return before[starts[1:]] - before[starts[:-1]]


def patch_v1_runner(runner: Any) -> None:
    """Have the V1 `runner` class (CPU, CUDA) report requests with hidden states or logits that are not finite."""
    require(runner, "_model_forward", "sample_tokens", "_bookkeeping_sync")
    forward: Callable[..., Any] = runner._model_forward
    sample: Callable[..., Any] = runner.sample_tokens
    bookkeep: Callable[..., tuple[Any, ...]] = runner._bookkeeping_sync

    def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        # Pipeline stages before the last give intermediate tensors: NaN in them is NaN in the last one, too.
        self.fusion_bad = clear_nonfinite(hidden) if isinstance(hidden, torch.Tensor) else None
        return output

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.execute_model_state
        if state is not None and state.logits is not None:
            self.fusion_bad_logits = _count_logits(find_overflows(state.logits), state.spec_decode_metadata)
        return sample(self, *args, **kwargs)

    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        counts, device_counts, *others = bookkeep(self, *args, **kwargs)
        bad, bad_logits = (self.__dict__.pop(name, None) for name in ("fusion_bad", "fusion_bad_logits"))
        found = [rows for rows in (bad, bad_logits) if rows is not None]
        if not any(rows.device.type != "cpu" or bool(rows.any()) for rows in found):
            return counts, device_counts, *others
        batch = self.input_batch
        by_request = torch.zeros(batch.num_reqs, dtype=torch.int32, device=found[0].device)
        if bad is not None:
            by_request += count_by_request(bad, self.query_start_loc.gpu[: batch.num_reqs + 1])
        if bad_logits is not None:
            by_request += bad_logits * self.discard_request_mask.gpu[: batch.num_reqs].logical_not()
        if self.use_async_scheduling:  # they travel with the sampled tokens' copy
            return counts, by_request, *others
        return dict(zip(batch.req_ids, by_request.tolist(), strict=True)), device_counts, *others

    runner._model_forward = _model_forward
    runner.sample_tokens = sample_tokens
    runner._bookkeeping_sync = _bookkeeping_sync


def _count_logits(bad: torch.Tensor, drafts: Any) -> torch.Tensor:
    """How many rows of logits of each request are `bad`, int32 [requests]; one row each unless there are drafts."""
    if drafts is None:
        return bad.int()
    starts = torch.tensor([0, *drafts.num_draft_tokens]).cumsum(0) + torch.arange(len(drafts.num_draft_tokens) + 1)
    return count_by_request(bad, starts.to(bad.device))


def patch_v2_runner(runner: Any, *samplers: Any) -> None:
    """Have the V2 `runner` class (CUDA) report requests with hidden states or logits that are not finite.

    `samplers` are the modules that count NaN in logits, which this counts instead.
    """
    require(runner, "sample")
    stock: Callable[..., Any] = runner.sample
    for module in samplers:
        require(module, "get_num_nans")
        module.get_num_nans = lambda logits: find_overflows(logits).int()

    def sample(self: Any, hidden_states: torch.Tensor, input_batch: Any, grammar_output: Any) -> Any:
        bad = clear_nonfinite(hidden_states)  # in place: log-probabilities of the prompt are computed from them later
        if self.sampler is not None:
            require(self.sampler, "compute_nans")
            self.sampler.compute_nans = True
        output, *others = stock(self, hidden_states, input_batch, grammar_output)
        counts = count_by_request(bad, input_batch.query_start_loc[: input_batch.num_reqs + 1])
        if output.num_nans is not None:
            by_row = output.num_nans
            if len(by_row) != len(counts):  # with drafts
                by_row = count_by_request(by_row, input_batch.cu_num_logits[: input_batch.num_reqs + 1])
            counts += by_row * (output.num_sampled > 0)
        output.num_nans = counts
        return output, *others

    runner.sample = sample


def patch_cpu_zeroing(runner: Any) -> None:
    """Have the CPU `runner` class zero blocks of every kind of attention; vLLM's zeroes full attention's only."""
    require(runner, "_zero_block_ids", "_kv_cache_spec_attn_group_iterator")

    def caches(self: Any) -> list[torch.Tensor]:
        """Key-value caches by block, [blocks, …], each memory once."""
        layers, blocks = self.compilation_config.static_forward_context, self.kv_cache_config.num_blocks
        tensors: dict[int, torch.Tensor] = {}
        for group in self._kv_cache_spec_attn_group_iterator():
            for name in group.layer_names if isinstance(group.kv_cache_spec, AttentionSpec) else ():
                cache = layers[name].kv_cache
                if isinstance(cache, torch.Tensor) and cache.numel():
                    if group.kernel_block_stride:
                        cache = group.map_kv_cache_to_manager_blocks(cache, blocks)
                    tensors.setdefault(cache.data_ptr(), cache)
        return list(tensors.values())

    def _zero_block_ids(self: Any, block_ids: list[int]) -> None:
        if not hasattr(self, "fusion_caches"):
            self.fusion_caches = caches(self)
        for cache in self.fusion_caches:
            size = cache.shape[0] // self.kv_cache_config.num_blocks  # kernel blocks of one block
            for block in block_ids:
                cache[block * size : (block + 1) * size].zero_()

    runner._zero_block_ids = _zero_block_ids


def zero_new_blocks() -> None:
    """Have vLLM zero every block that a request newly gets, in the scheduler's process and in the workers'.

    vLLM does so only for caches that it reads before they are written: https://github.com/vllm-project/vllm/pull/35219
    """
    require(KVCacheConfig, "needs_kv_cache_zeroing")
    KVCacheConfig.needs_kv_cache_zeroing = property(lambda self: True)  # type: ignore[method-assign]  # replaced on purpose


def patch_cpu_stages(runner: Any) -> None:
    """Have a pipeline stage on CPUs make what it receives from the stage before it; vLLM makes it in a warm-up that it
    leaves out with LoRA.
    """
    require(runner, "sync_and_gather_intermediate_tensors")
    gather: Callable[..., Any] = runner.sync_and_gather_intermediate_tensors

    def sync_and_gather_intermediate_tensors(self: Any, *args: Any, **kw: Any) -> Any:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return gather(self, *args, **kw)

    runner.sync_and_gather_intermediate_tensors = sync_and_gather_intermediate_tensors


def install(*, cpu: bool) -> None:
    """Patch the runners of this process; `cpu` says on which platform."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    zero_new_blocks()
    patch_v1_runner(GPUModelRunner)
    logprob_rows.install()
    if cpu:
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        patch_cpu_zeroing(CPUModelRunner)
        patch_cpu_seeds(GPUModelRunner)
        patch_cpu_stages(GPUModelRunner)
    else:  # the V2 runner's modules need Triton to import
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2Runner
        from vllm.v1.worker.gpu.sample import sampler
        from vllm.v1.worker.gpu.spec_decode import rejection_sampler

        patch_v2_runner(V2Runner, sampler, rejection_sampler)
