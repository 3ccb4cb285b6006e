"""Seam 1 in this process: the row of each token of a step, and what the V1 and V2 runners give and get."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.v1.worker.gpu.lora_utils import LoraState
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from adapters import PROMPT
from service.engine import seam
from service.engine.names import mix_name
from service.engine.rows import RowStore
from service.engine.supported import UnknownVllmError, check_version
from service.engine.weights import Phase, Weights, function_name, read_mix


def mix(*spans: tuple[int, float], id_: int = 7) -> LoRARequest:
    return LoRARequest(mix_name("stack", spans), id_, "/path")


def plain(id_: int = 8) -> LoRARequest:
    return LoRARequest("~build/key", id_, "/path")


def function(*phases: tuple[int, Any], id_: int = 7) -> LoRARequest:
    weights = Weights((2, 2), tuple(Phase(start, values) for start, values in phases))
    return LoRARequest(function_name("stack", weights), id_, "/path")


def step(requests: list[Any], scheduled: list[int], computed: list[int], prompts: list[int]) -> seam.Step:
    return seam.Step(requests, np.array(scheduled), np.array(computed), np.array(prompts))


def make_store(slices: int = 1, rank: int = 4) -> RowStore:
    store = RowStore([str(i) for i in range(slices)], 16, rank, "cpu")
    store.number_modules({str(i): i for i in range(slices)})
    return store


def test_rows_repeat_each_requests_weights_over_its_tokens() -> None:
    store, requests = make_store(), [mix((2, 0.5), (1, -2.0)), None, plain(), mix((3, 0.0))]
    index, uniform = seam.step_rows(store, step(requests, [2, 1, 2, 1], [0, 9, 4, 0], [2, 5, 9, 1]))
    expected = [[0.5, 0.5, -2, 0]] * 2 + [[0, 0, 0, 0]] + [[1, 1, 1, 1]] * 2 + [[0, 0, 0, 0]]
    assert torch.equal(store.rows[0, torch.from_numpy(index)], torch.tensor(expected))
    assert index.dtype == np.int64
    assert uniform


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 20])
def test_a_token_has_the_weights_of_its_position_however_a_request_is_chunked(chunk: int) -> None:
    table = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    store, prompt, total = make_store(3), 5, 12
    request = function((PROMPT, [0.0, 0.0]), (0, [1.0, 0.5]), (2, table), (4, [2.0, 2.0]))
    rows = []
    for start in range(0, total, chunk):
        count = min(chunk, total - start)
        both = step([request, mix((4, 0.25))], [count, 1], [start, start], [prompt, 3])
        index, uniform = seam.step_rows(store, both)
        assert uniform == (not (start < 8 and start + count > 6))
        rows.append(store.rows[:, torch.from_numpy(index[:count])].clone())
        assert (store.rows[:, index[count]] == 0.25).all()
    acts = (
        [[0, 0]] * 4 + [[1, 0.5]] * 2 + [None] * 2 + [[2, 2]] * 4
    )  # the prompt's last token computes the answer's first
    for position, weights in enumerate(acts):
        expected = np.repeat(table if weights is None else np.array([weights] * 3), 2, axis=1)
        assert np.allclose(torch.cat(rows, 1)[:, position].numpy(), expected)


def test_rows_are_right_in_every_step_of_requests_that_come_and_go() -> None:
    """Also where a step is like the one before, whose rows it takes, and where a prompt is known in part."""
    draw = np.random.default_rng(1)
    tables = [draw.normal(size=(3, 2)).astype(np.float32) for _ in range(3)]
    kinds = [None, plain(), mix((4, 0.5)), mix((2, 1.0), (2, 2.0)), mix((4, 0.0)), function((PROMPT, tables[0]))]
    kinds += [function((PROMPT, [0.0, 0.0]), (0, [1.0, 3.0])), function((PROMPT, [1, 2]), (1, tables[1]), (6, [3, 4]))]
    store, repeated = RowStore(["0", "1", "2"], 12, 4, "cpu"), 0
    store.number_modules({"0": 0, "1": 1, "2": 2})
    running: list[list[Any]] = []
    for _ in range(400):
        running = [entry for entry in running if draw.random() > 0.02 and entry[1] < 40]
        if len(running) < 4 and draw.random() < 0.3:
            prompt = int(draw.integers(1, 12))
            running.append([kinds[draw.integers(len(kinds))], int(draw.integers(prompt)), prompt])
        if not running:
            continue
        scheduled = [
            1 if done >= prompt - 1 else int(draw.integers(1, prompt - done + 1)) for _, done, prompt in running
        ]
        before = store.last
        requests, computed, prompts = ([entry[i] for entry in running] for i in range(3))
        index, uniform = seam.step_rows(store, step(requests, scheduled, computed, prompts))
        repeated += store.last is before is not None
        expected = [
            expect(request, done + i, prompt)
            for (request, done, prompt), count in zip(running, scheduled, strict=True)
            for i in range(count)
        ]
        assert np.array_equal(store.rows[:, torch.from_numpy(index)].numpy(), np.stack(expected, 1))
        assert not uniform or all((rows == rows[:1]).all() for rows in expected)
        for entry, count in zip(running, scheduled, strict=True):
            entry[1] += count
    assert repeated > 50


def test_a_request_after_an_equal_one_with_a_shorter_prompt_has_its_own_borders() -> None:
    """Its prompt is in the prefix cache up to a position where the one before has answered."""
    store, request = make_store(), function((PROMPT, [1.0, 1.0]), (0, [2.0, 2.0]), (2, [3.0, 3.0]))
    rows = []
    for computed, scheduled, prompt in ((9, 1, 5), (10, 2, 12), (10, 2, 12), (11, 1, 12)):
        index, _ = seam.step_rows(store, step([request], [scheduled], [computed], [prompt]))
        rows.append(store.rows[0, torch.from_numpy(index), 0].tolist())
    assert rows == [[3], [1, 2], [1, 2], [2]]


def expect(request: Any, position: int, prompt: int) -> Any:
    """The rows [3, 4] at a position, by the definition."""
    mix_ = None if request is None else read_mix(request.lora_name)
    if mix_ is None:
        return np.full((3, 4), 0.0 if request is None else 1.0, np.float32)
    acting = [t for s, t in zip(mix_.starts, mix_.tables, strict=True) if s == PROMPT or prompt - 1 + s <= position][-1]
    return np.broadcast_to(acting.expand(), (3, 4))


class Rows:
    """A wrapper's door to the runners: what they write."""

    def __init__(self) -> None:
        self.fusion_store = make_store()
        self.written: list[Any] = []

    def set_rows(self, index: Any, uniform: bool = True) -> None:
        self.written.append(None if index is None else self.fusion_store.rows[0, torch.from_numpy(index), 0].tolist())


def give_manager(runner: Any) -> Rows:
    rows = Rows()
    adapters = SimpleNamespace(punica_wrapper_mapping={"lm": rows}, supports_mm=False)
    runner.lora_manager = SimpleNamespace(_adapter_manager=adapters, set_active_adapters=lambda *_: None)
    return rows


def patched_runner() -> Any:
    patched: Any = type("Patched", (LoRAModelRunnerMixin,), dict(vars(LoRAModelRunnerMixin)))
    seam.patch_runner(patched)
    return patched()


def test_the_v2_runner_counts_stacks_by_id_and_writes_rows_by_position() -> None:
    patched: Any = type("Patched", (LoraState,), dict(vars(LoraState)))
    seam.patch_v2_state(patched)
    runner = patched_runner()
    runner.lora_state = state = patched(4)
    rows = give_manager(runner)
    requests = {"a": mix((2, 0.5)), "b": function((PROMPT, [0.25, 0]), (0, [0.75, 0])), "c": None, "d": plain()}
    for i, (name, request) in enumerate(requests.items()):
        state.add_request(name, i, request)
    computed, prompts = np.array([0, 2, 0, 7]), SimpleNamespace(np=np.array([9, 4, 9, 9]))
    runner.req_states = SimpleNamespace(num_computed_tokens_np=computed, prompt_len=prompts)
    inputs = state.make_lora_inputs(["d", "b", "c", "a"], np.array([3, 1, 2, 0]), np.array([1, 3, 1, 1]))
    assert inputs[1] == (8, 7, 7, 7, 0, 7)
    assert sorted(r.lora_int_id for r in inputs[2]) == [7, 8]
    runner._set_active_loras(*inputs)  # noqa: SLF001 - vLLM's
    runner._set_active_loras((), (), set())  # noqa: SLF001 - vLLM's
    assert rows.written == [[1, 0.25, 0.75, 0.75, 0, 0.5], None]


def test_the_v1_runner_writes_rows_each_step_and_resets_them_for_dummy_runs() -> None:
    runner = patched_runner()
    rows = give_manager(runner)
    phases = function((PROMPT, [0.25, 1]), (1, [4.0, 1]))
    runner.requests = {"a": SimpleNamespace(lora_request=phases), "b": SimpleNamespace(lora_request=None)}
    batch = SimpleNamespace(
        req_ids=["a", "b"],
        num_computed_tokens_cpu=np.array([2, 0, 99]),
        num_prompt_tokens=np.array([3, 1, 99]),
        make_lora_inputs=lambda *_: ((7, 0), (7, 7, 0), set()),
    )
    runner.set_active_loras(batch, np.array([2, 1]))
    runner._set_active_loras((), (), set())  # noqa: SLF001 - vLLM's
    assert rows.written == [[0.25, 4.0, 0.0], None]


def test_a_vllm_that_moved_something_is_named() -> None:
    with pytest.raises(UnknownVllmError, match=r"0\.34\.0.*0\.32\.0, 0\.33\.0"):
        check_version("0.34.0")
    with pytest.raises(UnknownVllmError, match="make_lora_inputs"):
        seam.patch_v2_state(type("LoraState", (), {}))
    check_version("0.32.0+cpu")
