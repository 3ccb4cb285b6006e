"""Seam 1: the model runner, where the step's tokens are mapped to adapters and now to rows of weights too.

`install` is called by `worker` inside every worker process, before the model is loaded. It patches
vLLM's V1 runner (CPU, CUDA) and V2 runner (CUDA); every name it replaces is checked first, so another vLLM
is rejected with an error that names what is missing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.engine import runners, slices
from service.engine.rows import ONES, ZEROS, RowStore
from service.engine.slices import find_language_wrapper
from service.engine.supported import UnknownVllmError, check_version, require
from service.engine.weights import FAR, Table, read_mix

_BASE, _ADAPTER = "base", "adapter"
SEAM_VERSION = 3  # in the engine's additional_config: compiled caches of other seams are not reused


@dataclass(frozen=True, slots=True)
class Step:
    """A step's requests in batch order: their `LoRARequest`s (None for the base), and for each how many tokens are
    computed, after how many that are, and how many its prompt has.
    """

    requests: Sequence[Any]
    scheduled: NDArray[np.integer[Any]]
    computed: NDArray[np.integer[Any]]
    prompts: NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class _Repeat:
    """What a step found, for the next one of the same requests: the row of each, and at which positions it holds, which
    depends on the length of its prompt.
    """

    requests: Sequence[Any]
    prompts: NDArray[np.integer[Any]]
    rows: NDArray[np.int64]
    since: NDArray[np.int64]
    until: NDArray[np.int64]
    uniform: bool

    def holds(self, step: Step) -> bool:
        """Whether all tokens of `step` have the same rows again."""
        return bool(
            self.requests == step.requests
            and (step.prompts == self.prompts).all()
            and (step.computed >= self.since).all()
            and (step.computed + step.scheduled <= self.until).all()
        )


def step_rows(store: RowStore, step: Step) -> tuple[NDArray[np.int64], bool]:
    """The row in `store` of each token of a step, int64 [sum of scheduled]; whether all modules' are the same.

    The base has zeros, an ordinary adapter ones, a mix its weights at the token's position.
    """
    last: _Repeat | None = store.last
    if last is not None and last.holds(step):
        return np.repeat(last.rows, step.scheduled), last.uniform
    return _find_rows(store, step)


def _find_rows(store: RowStore, step: Step) -> tuple[NDArray[np.int64], bool]:
    """`step_rows` of a step unlike the last; leaves what it found in the store when each request has one row."""
    tables: dict[str, Table] = {}
    keys, counts, borders = list[str](), list[int](), list[tuple[int, int]]()
    single = True
    numbers = zip(step.scheduled.tolist(), step.computed.tolist(), step.prompts.tolist(), strict=True)
    for request, (scheduled, position, prompt) in zip(step.requests, numbers, strict=True):
        mix = None if request is None else read_mix(request.lora_name)
        if mix is None:
            keys.append(_BASE if request is None else _ADAPTER)
            counts.append(scheduled)
            borders.append((0, FAR))
            continue
        end = position + scheduled
        single = single and scheduled > 0
        while position < end:
            table, since, until = mix.phase(position, prompt)
            if not table.is_zero:
                tables[table.digest] = table
            keys.append(_BASE if table.is_zero else table.digest)
            counts.append(min(until, end) - position)
            borders.append((since, until))
            single = single and until >= end
            position = until
    places = {_BASE: ZEROS, _ADAPTER: ONES, **store.place(tables)}
    rows = np.array([places[key] for key in keys], dtype=np.int64)
    uniform = all(table.is_uniform for table in tables.values())
    since_all, until_all = np.array(borders, dtype=np.int64).reshape(-1, 2).T
    known = list(step.requests), step.prompts.copy(), rows, since_all, until_all, uniform
    store.last = _Repeat(*known) if single else None
    return np.repeat(rows, counts), uniform


def patch_runner(mixin: Any) -> None:
    """Have the runner class `mixin` (V1, and the step itself of V2) write each token's row before each step."""
    require(mixin, "set_active_loras", "_set_active_loras")
    set_v1: Callable[..., None] = mixin.set_active_loras
    set_any: Callable[..., None] = mixin._set_active_loras

    def set_active_loras(self: Any, input_batch: Any, num_scheduled: Any, *args: Any, **kw: Any) -> None:
        count = len(num_scheduled)
        self.fusion_step = Step(
            [self.requests[i].lora_request for i in input_batch.req_ids[:count]],
            np.asarray(num_scheduled),
            input_batch.num_computed_tokens_cpu[:count],
            input_batch.num_prompt_tokens[:count],
        )
        set_v1(self, input_batch, num_scheduled, *args, **kw)

    def _set_active_loras(self: Any, *args: Any, **kw: Any) -> None:
        set_any(self, *args, **kw)
        wrapper = find_language_wrapper(self.lora_manager)
        if (step := _pop_step(self)) is None:  # dummy and capture runs
            wrapper.set_rows(None)
        else:
            wrapper.set_rows(*step_rows(wrapper.fusion_store, step))

    mixin.set_active_loras = set_active_loras
    mixin._set_active_loras = _set_active_loras


def _pop_step(runner: Any) -> Step | None:
    """What is remembered of the step at hand."""
    if not hasattr(runner, "lora_state"):
        step: Step | None = runner.__dict__.pop("fusion_step", None)
        return step
    remembered = runner.lora_state.__dict__.pop("fusion_step", None)
    if remembered is None:
        return None
    requests, rows, scheduled = remembered
    states = runner.req_states  # V2's
    return Step(requests, scheduled, states.num_computed_tokens_np[rows], states.prompt_len.np[rows])


def patch_v2_state(state: Any) -> None:
    """Have the V2 runner's `state` class remember each step's requests and count active adapters by id."""
    require(state, "make_lora_inputs", "get_activate_loras")
    make: Callable[..., Any] = state.make_lora_inputs
    active: Callable[..., set[Any]] = state.get_activate_loras

    def make_lora_inputs(self: Any, req_ids: Any, idx_mapping: Any, num_scheduled: Any) -> Any:
        self.fusion_step = ([self.lora_requests.get(i) for i in req_ids], idx_mapping, np.asarray(num_scheduled))
        return make(self, req_ids, idx_mapping, num_scheduled)

    def get_activate_loras(self: Any, req_ids: Any) -> set[Any]:
        # By id, not by name: all mixes of a stack are one active adapter.
        return set({r.lora_int_id: r for r in active(self, req_ids)}.values())

    state.make_lora_inputs = make_lora_inputs
    state.get_activate_loras = get_activate_loras


def _patch_wrapper(platform: Any) -> None:
    require(platform, "get_punica_wrapper")
    stock = platform.get_punica_wrapper().rpartition(".")[2]
    if stock == "PunicaWrapperCPU":
        name = "service.engine.punica.MixedPunicaCPU"
    elif stock == "PunicaWrapperGPU":
        name = "service.engine.punica_gpu.MixedPunicaGPU"
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
    slices.patch_loading(LoRAModelRunnerMixin)
    runners.install(cpu=current_platform.is_cpu())
