"""Rows of weights in the workers: the store, what layers read of it, and the compiled multiply."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.request import LoRARequest

from adapters import PROMPT
from service.engine import rows as rows_module, slices
from service.engine.rows import ONES, ZEROS, RowStore, choose_capacity, weigh
from service.engine.spare_rows import RowsBusyError, SpareRows, hold_rows
from service.engine.weights import Phase, Table, Weights, function_name, make_table

RANK, MODULES = 4, ("q", "k", "v")


def uniform(value: float) -> Table:
    return make_table(np.full((1, 2), value, np.float32), (1, 2))


def by_module(seed: int) -> Table:
    return make_table(np.random.default_rng(seed).normal(size=(3, 3)).astype(np.float32), (1, 2))


def make_store(capacity: int = 8, names: tuple[str, ...] = MODULES) -> RowStore:
    store = RowStore(names, capacity, RANK, "cpu")
    store.number_modules({name: row for row, name in enumerate(MODULES)})
    return store


def place(store: RowStore, *tables: Table) -> list[int]:
    places = store.place({table.digest: table for table in tables})
    return [places[table.digest] for table in tables]


def test_the_base_has_zeros_and_ordinary_adapters_ones() -> None:
    store = make_store()
    assert not store.rows[:, ZEROS].any()
    assert (store.rows[:, ONES] == 1).all()


def test_a_table_is_written_once_and_padded_with_zeros() -> None:
    store, table = make_store(), by_module(0)
    (row,) = place(store, table)
    assert torch.equal(store.rows[:, row, :3], torch.from_numpy(table.expand()))
    assert not store.rows[:, row, 3:].any()
    store.rows[:, row] = 7
    assert place(store, table) == [row]
    assert (store.rows[:, row] == 7).all(), "known rows are not written again"


def test_slices_read_the_row_of_their_module_and_unknown_ones_zeros() -> None:
    store, table = make_store(names=("v", "k", "k", "other")), by_module(0)
    (row,) = place(store, table)
    expected = torch.from_numpy(table.expand())[[2, 1, 1]]
    assert torch.equal(store.rows[:3, row, :3], expected)
    assert not store.rows[3, row].any()
    (row,) = place(store, uniform(0.5))
    assert (store.rows[:, row, :3] == 0.5).all()


def test_only_rows_that_the_step_does_not_need_are_overwritten() -> None:
    store = make_store(capacity=6)
    draw = np.random.default_rng(0)
    tables = [uniform(i + 1) for i in range(6)] + [by_module(i) for i in range(6)]
    for _ in range(200):
        step = [tables[i] for i in draw.choice(len(tables), 4, replace=False)]
        places = place(store, *step)
        assert len({ZEROS, ONES, *places}) == 6
        for table, row in zip(step, places, strict=True):
            values = np.broadcast_to(table.expand(), (3, 3))
            assert np.array_equal(store.rows[:, row, :3].numpy(), values)


def test_a_step_that_needs_more_rows_than_there_are_never_runs() -> None:
    store = make_store(capacity=4)
    with pytest.raises(RuntimeError, match="needs 3 rows of weights, there are 2"):
        place(store, uniform(1), uniform(2), uniform(3))


def test_weights_of_other_modules_never_run() -> None:
    store = RowStore(MODULES, 4, RANK, "cpu")
    with pytest.raises(RuntimeError, match="before the modules were numbered"):
        place(store, by_module(0))
    assert store.number_modules({"q": 0, "v": 5}) == {0, 5}
    with pytest.raises(RuntimeError, match="weights of 3 modules: this engine has others"):
        place(store, by_module(0))


@pytest.mark.parametrize(
    ("seqs", "tokens", "budget", "capacity", "spare"),
    [
        (16, 2048, 2**28, 8 * 16, None),  # all phases of all sequences
        (256, 512, 2**28, 512, None),  # no step has more rows than tokens
        (16, 2048, 0, 16 + 7, 7),  # one request's phases, at least
        (16, 2048, 40 * 4 * 10 * RANK, 40, 24),
    ],
)
def test_a_store_has_room_for_every_step_or_says_how_much(
    seqs: int, tokens: int, budget: int, capacity: int, spare: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "BUDGET_BYTES", budget)
    rows = choose_capacity(10, RANK, seqs, tokens)
    assert rows % 4 == 0
    assert capacity + 2 <= rows < capacity + 6
    found = RowStore(("",) * 10, rows, RANK, "cpu").spare(seqs, tokens)
    assert found is spare is None or (found is not None and spare is not None and 0 <= found - spare < 4)


class Linear(BaseLinearLayerWithLoRA):
    """A LoRA layer with a number of slices, as far as rows go."""

    def __init__(self, count: int, wrapper: Any) -> None:
        torch.nn.Module.__init__(self)
        self.n_slices, self.punica_wrapper = count, wrapper


class Wrapper:
    """Remembers the rows that a layer hands on."""

    fusion_index = torch.zeros(16, dtype=torch.int64)
    token_mapping_meta = "own"

    def add_lora_linear(self, *args: Any, rows: torch.Tensor, **kwargs: Any) -> tuple[Any, ...]:
        return args, rows, kwargs

    add_shrink = add_lora_linear


def make_manager(wrapper: Any) -> Any:
    modules = {"a.qkv_proj": Linear(3, wrapper), "a.o_proj": Linear(1, wrapper), "tower.fc": Linear(1, Wrapper())}
    manager = SimpleNamespace(
        punica_wrapper_mapping={"lm": wrapper},
        supports_mm=False,
        modules=modules,
        packed_modules={"a.qkv_proj": ["a.q_proj", "a.k_proj", "a.v_proj"]},
        lora_config=SimpleNamespace(max_lora_rank=RANK),
        device="cpu",
        model=SimpleNamespace(),
    )
    return SimpleNamespace(_adapter_manager=manager)


def test_layers_hand_on_their_own_slices_of_one_store() -> None:
    wrapper: Any = Wrapper()
    lora = make_manager(wrapper)
    store = slices.give_rows(lora, 4)
    assert store is wrapper.fusion_store
    assert store.names == ("a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj")
    layers = lora._adapter_manager.modules  # noqa: SLF001 - vLLM's
    qkv, o = layers["a.qkv_proj"].punica_wrapper, layers["a.o_proj"].punica_wrapper
    args, rows, kwargs = qkv.add_lora_linear(1, 2, add_inputs=False)
    assert (args, kwargs) == ((1, 2), {"add_inputs": False})
    assert (rows.shape[0], rows.data_ptr()) == (3, store.rows.data_ptr())
    assert o.add_shrink(1)[1].data_ptr() == store.rows[3:].data_ptr()
    assert o.token_mapping_meta == "own"
    assert isinstance(layers["tower.fc"].punica_wrapper, Wrapper)
    assert slices.number_modules(lora, ["a.v_proj", "none", "a.q_proj"]) == ["a.v_proj", "a.q_proj"]


@pytest.mark.parametrize(
    ("packed", "count", "names"),
    [
        ([], 1, ["m"]),
        ([], 3, ["m"] * 3),
        (["g", "u"], 2, ["g", "u"]),
        (["qkv", "z"], 4, ["qkv", "qkv", "qkv", "z"]),
    ],
)
def test_every_slice_has_a_module(packed: list[str], count: int, names: list[str]) -> None:
    assert slices.name_slices("m", {"m": packed} if packed else {}, count) == names


def test_the_compiled_multiply_reads_rows_and_index_anew_and_is_one_graph_for_all_layers() -> None:
    """A number frozen into a graph, or a buffer that is replaced, would go on with the weights of before."""
    store, index = make_store(names=("q", "k", "v", "o", "q", "k")), torch.full((16,), ONES)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(str(graph.code))
        return graph.forward

    class Shared:
        def add_shrink(self, y: torch.Tensor, *, rows: torch.Tensor) -> None:
            weigh(y, rows, index)

    class Layer(torch.nn.Module):
        def __init__(self, start: int) -> None:
            super().__init__()
            self.punica_wrapper = slices.LayerPunica(Shared(), store.part(start, 3))

        def forward(self, y: torch.Tensor) -> torch.Tensor:
            y = y.clone()
            self.punica_wrapper.add_shrink(y)
            return y

    y = torch.randn(3, 5, RANK)
    for start in (0, 3):
        torch._dynamo.reset()  # noqa: SLF001 - as a layer of another model
        compiled = torch.compile(Layer(start), backend=count, fullgraph=True)
        for step in range(3):
            index[:5] = torch.tensor([ZEROS, ONES, *place(store, by_module(step), uniform(step + 1)), ZEROS])
            expected = y * store.rows[start : start + 3, index[:5]]
            assert torch.equal(compiled(y), expected)
    assert len(graphs) == 2
    assert graphs[0] == graphs[1]


def test_an_infinite_coordinate_of_weight_zero_is_zero() -> None:
    y = torch.full((1, 2, RANK), float("inf"))
    weigh(y, make_store().rows[:1], torch.tensor([ZEROS, ONES]))
    assert not y[0, 0].any()
    assert y[0, 1].isinf().all()


def test_weights_of_other_modules_reach_no_worker() -> None:
    rows = SpareRows()
    rows.modules = 2
    for count, refused in ((1, False), (2, False), (3, True)):
        values = np.random.default_rng(0).normal(size=(count, 2))
        lora = LoRARequest(function_name("s", Weights((1, 2), (Phase(PROMPT, values), Phase(1, [0, 1])))), 1, "/x")
        with pytest.raises(ValueError, match="weights of 3 modules: this engine has 2") if refused else nullcontext():
            hold_rows(lambda *_args, **_options: None, rows)(1, 2, lora_request=lora)  # type: ignore[arg-type,return-value]  # not run


def test_requests_with_phases_wait_for_rows_where_these_are_few() -> None:
    async def main() -> None:
        rows, running, end = SpareRows(0.3), list[int](), asyncio.Event()

        async def generate(prompt: int, _: Any, *, lora_request: Any) -> AsyncGenerator[int, None]:
            running.append(prompt)
            yield 1
            await end.wait()

        def function(*starts: int) -> LoRARequest:
            phases = (Phase(start, [start, 1]) for start in (PROMPT, *starts))
            return LoRARequest(function_name("s", Weights((1, 1), tuple(phases))), 1, "/x")

        async def ask(number: int, lora: Any) -> None:
            async for _ in hold_rows(generate, rows)(number, None, lora_request=lora):
                pass

        loras = [function(0, 1, 2, 3), function(0, 1, 2, 3), function(0), function(), None]
        tasks = [asyncio.create_task(ask(number, lora)) for number, lora in enumerate(loras)]
        await asyncio.sleep(0.01)
        assert running == [0, 1, 2, 3, 4], "where no step needs more, nobody waits"
        rows.count = 5
        tasks += [asyncio.create_task(ask(10 + number, lora)) for number, lora in enumerate(loras)]
        await asyncio.sleep(0.01)
        assert running[5:] == [10, 13, 14], "one after the other, the first come first"
        tasks[6].cancel()  # it waits, and leaves
        await asyncio.sleep(0.01)
        assert running[5:] == [10, 13, 14, 12]
        with pytest.raises(RowsBusyError, match=r"had all rows of the engine for 0.3 s"):
            await ask(20, loras[0])
        end.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert rows._used == 0  # noqa: SLF001 - all is given back

    asyncio.run(main())


def test_the_cuda_wrapper_weighs_by_the_layers_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whole layers, and in those that only shrink; with products in the place of Triton kernels."""
    stock = pytest.importorskip("vllm.lora.punica_wrapper.punica_gpu").PunicaWrapperGPU
    punica_gpu = pytest.importorskip("service.engine.punica_gpu")
    weighed: list[torch.Tensor] = []

    def shrink(_: Any, y: torch.Tensor, x: torch.Tensor, a: Any, scale: float, **kwargs: Any) -> None:
        assert not kwargs
        y.copy_(torch.stack([x @ factor[0, 0].T for factor in a]) * scale)

    def update(y: torch.Tensor, x: torch.Tensor, a: Any, b: Any, rows: torch.Tensor, index: Any, *others: Any) -> None:
        assert others == ("slots", "idle", 2.0)
        weighed.append(torch.stack([x @ factor[0, 0].T for factor in a]) * 2 * rows[:, index[: len(x)]])
        y += torch.cat([part @ factor[0, 0].T for part, factor in zip(weighed[0], b, strict=True)], 1)

    monkeypatch.setattr(stock, "add_shrink", shrink)
    monkeypatch.setattr(torch.ops.vllm, "fusion_add_update", update)
    wrapper: Any = object.__new__(punica_gpu.MixedPunicaGPU)
    wrapper.make_rows(16, SimpleNamespace(max_lora_rank=RANK), "cpu")
    wrapper.token_mapping_meta = SimpleNamespace(token_lora_mapping="slots", no_lora_flag_cpu="idle")
    store = wrapper.fusion_store = make_store(names=("q", "k", "v", "o"))
    layer = slices.LayerPunica(wrapper, store.part(1, 2))
    a, b = [tuple(torch.randn(1, 1, *shape) for _ in range(2)) for shape in ((RANK, 6), (5, RANK))]
    (row,) = place(store, by_module(0))
    x, y = torch.randn(3, 6), torch.zeros(3, 10)
    wrapper.set_rows(np.array([ONES, row, ZEROS]), uniform=False)
    layer.add_lora_linear(y, x, a, b, 2.0, (5, 5))
    layer.add_shrink(shrunk := torch.zeros(2, 3, RANK), x, a, 2.0)
    assert torch.allclose(shrunk, weighed[0], atol=1e-6)
    own = [2 * store.rows[1 + i, [ONES, row, ZEROS]] * (x @ factor[0, 0].T) for i, factor in enumerate(a)]
    assert torch.allclose(y, torch.cat([h @ f[0, 0].T for h, f in zip(own, b, strict=True)], 1), atol=1e-5)
