"""Seam 1: the model runner, where the step's tokens are mapped to adapters and now to weights too.

`install` is called by `worker` inside every worker process, before the model is loaded. It patches
vLLM's V1 runner (CPU, CUDA) and V2 runner (CUDA); every name it replaces is checked first, so another vLLM
is rejected with an error that names what is missing.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from service.engine import runners
from service.engine.names import weight_row
from service.engine.supported import UnknownVllmError, check_version, require

SEAM_VERSION = 2  # in the engine's additional_config: compiled caches of other seams are not reused


def step_rows(requests: Sequence[Any], num_tokens: NDArray[np.integer[Any]], width: int) -> NDArray[np.float32]:
    """Weight rows of one step, float32 [sum(num_tokens), width].

    `requests` are the step's `LoRARequest`s (None for the base: zeros) in batch order; an ordinary
    adapter has ones, a mix its own weights, zeros beyond its stack's rank.
    """
    rows = np.zeros((len(requests), width), dtype=np.float32)
    for i, request in enumerate(requests):
        if request is None:
            continue
        row = weight_row(request.lora_name)
        if row is None:
            rows[i] = 1.0
        else:
            rows[i, : row.size] = row
    return np.repeat(rows, num_tokens, axis=0)


def find_language_wrapper(lora_manager: Any) -> Any:
    """The LoRA layers' wrapper for the language model, whatever else the base has."""
    require(lora_manager, "_adapter_manager")
    manager = lora_manager._adapter_manager
    require(manager, "punica_wrapper_mapping", "supports_mm")
    wrappers = manager.punica_wrapper_mapping
    key = manager.mm_mapping.language_model[0] if manager.supports_mm else next(iter(wrappers))
    return wrappers[key]


def _write_rows(target: torch.Tensor, rows: NDArray[np.float32] | None) -> None:
    if rows is None:  # dummy and capture runs
        target.fill_(1.0)
        return
    source = torch.from_numpy(rows)
    if target.is_cuda:  # a fresh pinned buffer each step: the copy of the last one may be in flight
        source = source.pin_memory()
    target[: rows.shape[0]].copy_(source, non_blocking=True)


def patch_runner(mixin: Any) -> None:
    """Have the runner class `mixin` (V1, and the step itself of V2) write the weight rows before each step."""
    require(mixin, "set_active_loras", "_set_active_loras")
    set_v1: Callable[..., None] = mixin.set_active_loras
    set_any: Callable[..., None] = mixin._set_active_loras

    def set_active_loras(self: Any, input_batch: Any, num_scheduled: Any, *args: Any, **kw: Any) -> None:
        ids = input_batch.req_ids[: len(num_scheduled)]
        requests = [self.requests[i].lora_request for i in ids]
        self.fusion_step = (requests, np.asarray(num_scheduled))
        set_v1(self, input_batch, num_scheduled, *args, **kw)

    def _set_active_loras(self: Any, *args: Any, **kw: Any) -> None:
        set_any(self, *args, **kw)
        owner = self.lora_state if hasattr(self, "lora_state") else self
        step = owner.__dict__.pop("fusion_step", None)
        target = find_language_wrapper(self.lora_manager).fusion_rows
        if step is None:
            _write_rows(target, None)
            return
        requests, num_scheduled = step
        _write_rows(target, step_rows(requests, num_scheduled, target.shape[1]))

    mixin.set_active_loras = set_active_loras
    mixin._set_active_loras = _set_active_loras


def patch_v2_state(state: Any) -> None:
    """Have the V2 runner's `state` class remember each step's requests and count active adapters by id."""
    require(state, "make_lora_inputs", "get_activate_loras")
    make: Callable[..., Any] = state.make_lora_inputs
    active: Callable[..., set[Any]] = state.get_activate_loras

    def make_lora_inputs(self: Any, req_ids: Any, idx_mapping: Any, num_scheduled: Any) -> Any:
        self.fusion_step = ([self.lora_requests.get(i) for i in req_ids], np.asarray(num_scheduled))
        return make(self, req_ids, idx_mapping, num_scheduled)

    def get_activate_loras(self: Any, req_ids: Any) -> set[Any]:
        # By id, not by name: all mixes of a stack are one active adapter.
        return set({r.lora_int_id: r for r in active(self, req_ids)}.values())

    state.make_lora_inputs = make_lora_inputs
    state.get_activate_loras = get_activate_loras


def _patch_wrapper(platform: Any) -> None:
    from service.engine import punica

    require(platform, "get_punica_wrapper")
    stock = platform.get_punica_wrapper().rpartition(".")[2]
    if stock == "PunicaWrapperCPU":
        name = "service.engine.punica.MixedPunicaCPU"
    elif stock == "PunicaWrapperGPU":
        punica.MixedPunicaGPU = punica.cuda_wrapper()  # type: ignore[attr-defined]  # found by vLLM by name
        name = "service.engine.punica.MixedPunicaGPU"
    else:
        raise UnknownVllmError(f"no mixing for {stock!r}: expected vLLM's CPU or CUDA LoRA kernels")
    type(platform).get_punica_wrapper = classmethod(lambda cls: name)


@cache
def install() -> None:
    """Put both seams into this process; once, however often this is called."""
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu.lora_utils import LoraState
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    check_version(vllm.__version__)
    _patch_wrapper(current_platform)
    patch_runner(LoRAModelRunnerMixin)
    patch_v2_state(LoraState)
    runners.install(cpu=current_platform.is_cpu())
