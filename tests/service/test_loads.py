"""An adapter is loaded slice by slice between the engine's steps, packed once, and right in whatever slot it gets."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_model import LoRAModel

from service.engine import loads
from service.engine.loader import Loader
from service.engine.loads import Loads
from service.engine.punica import MixedPunicaCPU
from service.engine.slices import LayerPunica

RANK, D_IN, D_OUT, SLOTS, LAYERS = 8, 16, 12, 2, 6
CAPACITY = 3


class Layer:
    """A dense layer as vLLM's, with one slice."""

    output_slices = (D_OUT,)

    def __init__(self, wrapper: MixedPunicaCPU) -> None:
        self.lora_a_stacked = (torch.zeros(SLOTS, 1, RANK, D_IN),)
        self.lora_b_stacked = (torch.zeros(SLOTS, 1, D_OUT, RANK),)
        self.punica_wrapper = LayerPunica(wrapper, wrapper.fusion_store.rows)
        self.copies = 0

    def reset_lora(self, index: int) -> None:
        self.lora_a_stacked[0][index] = 0
        self.lora_b_stacked[0][index] = 0

    def set_lora(self, index: int, a: torch.Tensor, b: torch.Tensor) -> None:
        self.reset_lora(index)
        self.copies += 1
        self.lora_a_stacked[0][index, 0, : len(a)] = a
        self.lora_b_stacked[0][index, 0, :, : b.shape[1]] = b

    def add(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros(len(x), D_OUT)
        self.punica_wrapper.add_lora_linear(y, x, self.lora_a_stacked, self.lora_b_stacked, 1.0, self.output_slices)
        return y


class Manager:
    """vLLM's manager of adapters: those it has, and which has which slot."""

    capacity = CAPACITY

    def __init__(self) -> None:
        config = SimpleNamespace(max_lora_rank=RANK, max_loras=SLOTS, fully_sharded_loras=False)
        self.lora_config, self.supports_mm = config, False
        self.wrapper = MixedPunicaCPU(32, 4, "cpu", lora_config=config)
        self.punica_wrapper_mapping = {"language_model": self.wrapper}
        self.modules = {f"layer{i}": Layer(self.wrapper) for i in range(LAYERS)}
        self.lora_index_to_id: list[int | None] = [None] * SLOTS
        self.adapters: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.adapters)

    def list_adapters(self) -> dict[int, Any]:
        return dict(self.adapters)

    def get_adapter(self, id_: int) -> Any:
        return self.adapters.get(id_)

    def add_adapter(self, lora: Any) -> None:
        self.adapters[lora.id] = lora

    def remove_oldest_adapter(self) -> None:
        self.remove(next(iter(self.adapters)))

    def remove(self, id_: int) -> bool:
        self.lora_index_to_id = [None if one == id_ else one for one in self.lora_index_to_id]
        return self.adapters.pop(id_, None) is not None

    def activate_adapter(self, id_: int, slot: int | None = None) -> None:
        index = self.lora_index_to_id.index(None) if slot is None else slot
        self.lora_index_to_id[index] = id_
        for name, layer in self.modules.items():
            if (factors := self.adapters[id_].loras.get(name)) is None:
                layer.reset_lora(index)
            else:
                layer.set_lora(index, factors.lora_a, factors.lora_b)

    def compute(self, id_: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
        mapping = LoRAMapping((id_,) * len(x), (id_,) * len(x), is_prefill=False)
        self.wrapper.update_metadata(mapping, self.lora_index_to_id, SLOTS + 1, 1000)
        return {name: layer.add(x) for name, layer in self.modules.items()}


def make_adapter(id_: int, layers: int = LAYERS) -> Any:
    draw = torch.Generator().manual_seed(id_)
    loras = {
        f"layer{i}": SimpleNamespace(
            lora_a=torch.randn(4, D_IN, generator=draw), lora_b=torch.randn(D_OUT, 4, generator=draw), rank=4
        )
        for i in range(layers)
    }
    tensors = {
        f"{name}.lora_{kind}.weight": getattr(lora, f"lora_{kind.lower()}")
        for kind in "AB"
        for name, lora in loras.items()
    }
    return SimpleNamespace(id=id_, loras=loras, tensors=tensors)


class Model:
    """vLLM's model of an adapter."""

    def __init__(self, id_: int, rank: int, loras: dict[str, Any]) -> None:
        self.id, self.loras, self.modules_to_save = id_, loras, dict[str, Any]()

    @classmethod
    def from_lora_tensors(cls, id_: int, tensors: dict[str, torch.Tensor], helper: Any) -> "Model":
        loras: dict[str, Any] = {}
        for name, tensor in tensors.items():
            module, _, kind = name.removesuffix(".weight").rpartition(".")
            lora = loras.setdefault(module, SimpleNamespace(rank=helper.r, lora_a=None, lora_b=None))
            setattr(lora, kind.lower(), tensor)
        return cls(id_, helper.r, loras)


class World:
    """A worker's loads; `step` is a step of the engine."""

    def __init__(self, *adapters: Any) -> None:
        self.manager, self.files = Manager(), {one.id: one for one in adapters}
        self.lora_manager = SimpleNamespace(
            _load_adapter=self.read,
            _lora_model_cls=Model,
            remove_adapter=self.manager.remove,
            _adapter_manager=self.manager,
        )
        self.loads = Loads(self.lora_manager)

    def read(self, request: Any) -> Any:
        """As vLLM reads: the class makes layers of tensors."""
        adapter = self.files[request.lora_int_id]
        helper = SimpleNamespace(r=4)
        kind = vars(self.lora_manager)["_lora_model_cls"]
        return kind.from_lora_tensors(adapter.id, adapter.tensors, helper)

    def advance(self, id_: int) -> Any:
        return self.loads.advance(SimpleNamespace(lora_int_id=id_))

    def load(self, id_: int) -> Any:
        self.step()
        while (report := self.advance(id_)) is None:
            pass
        return report

    def step(self) -> None:
        self.manager.wrapper.set_rows(None)


def expect(adapter: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    none = torch.zeros(len(x), D_OUT)
    loras = adapter.loras.items()
    return dict.fromkeys((f"layer{i}" for i in range(LAYERS)), none) | {
        name: x @ lora.lora_a.t() @ lora.lora_b.t() for name, lora in loras
    }


def test_an_adapter_is_right_in_every_slot_and_copied_into_none() -> None:
    full, partial = make_adapter(7), make_adapter(8, layers=2)
    world, x = World(full, partial), torch.randn(5, D_IN)
    report = world.load(7)
    assert report.layers == dict.fromkeys(full.loras, 4)
    assert (report.infinite, report.missing) == ([], [])
    world.load(8)
    for slots in ([7, 8], [8, 7]):
        for slot, id_ in enumerate(slots):
            world.manager.activate_adapter(id_, slot)
        for adapter in (full, partial):
            found = world.manager.compute(adapter.id, x)
            for name, expected in expect(adapter, x).items():
                torch.testing.assert_close(found[name], expected)
    assert not any(layer.lora_a_stacked[0].any() for layer in world.manager.modules.values())


def test_between_two_steps_there_is_one_short_slice_and_without_steps_all_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(make_adapter(7), make_adapter(8))
    pack = Loads._pack  # noqa: SLF001 - what takes the time

    def slow(self: Loads, *args: Any) -> Any:
        time.sleep(0.004)
        return pack(self, *args)

    monkeypatch.setattr(Loads, "_pack", slow)
    world.step()
    while world.advance(7) is None:  # without a step, as soon as nothing seems to be computed
        pass
    slices = 0
    while True:
        world.step()
        slices += 1
        if world.advance(8) is not None:
            break
    assert slices >= LAYERS


def test_what_fails_or_goes_leaves_nothing() -> None:
    broken = make_adapter(7)
    broken.loras["layer3"].lora_b[0, 0] = torch.inf
    world = World(broken, *(make_adapter(id_) for id_ in range(8, 12)))
    assert world.load(7).infinite == ["layer3"]
    world.lora_manager.remove_adapter(7)
    assert not world.manager.wrapper.fusion_packs
    with pytest.raises(KeyError):
        world.load(99)
    for id_ in (8, 9, 10):
        world.load(id_)
    world.load(11)  # the oldest goes, as in vLLM's cache
    assert world.manager.wrapper.fusion_packs.keys() == world.manager.adapters.keys() == {9, 10, 11}


def test_the_server_asks_every_worker_until_all_have_an_adapter() -> None:
    done = {"layers": {"lm_head": 4}, "missing": [], "infinite": []}
    answers = [[[None, None]], [[done, None]], [[done, done]]]
    asked = []

    async def call(*args: Any) -> Any:
        asked.append(args)
        return answers[len(asked) - 1]

    loader = Loader(SimpleNamespace(call=call), staged=False, dtype=torch.float32)  # type: ignore[arg-type]  # its one method
    request: Any = SimpleNamespace(lora_name="x", lora_int_id=7, lora_path="/x")
    assert asyncio.run(loader.load(request)) == {"lm_head"}
    assert asked == [("fusion_load", "x", 7, "/x")] * 3


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        ({"layers": {}}, "loaded none"),
        ({"missing": ["lm_head"]}, "no worker has a LoRA layer for the adapter's 'lm_head'"),
        ({"infinite": ["layer3"]}, "overflow torch.float32 in 'layer3'"),
    ],
)
def test_what_a_worker_cannot_serve_is_refused(worker: dict[str, Any], message: str) -> None:
    async def call(*_: Any) -> Any:
        return [[{"layers": {"layer3": 4}, "missing": [], "infinite": [], **worker}]]

    loader = Loader(SimpleNamespace(call=call), staged=False, dtype=torch.float32)  # type: ignore[arg-type]  # its one method
    request: Any = SimpleNamespace(lora_name="x", lora_int_id=7, lora_path="/x")
    with pytest.raises(RuntimeError, match=message):
        asyncio.run(loader.load(request))


def test_tensors_are_read_one_part_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, read = make_adapter(7), list[str]()

    def defer(name: str, tensor: torch.Tensor) -> Any:
        def call() -> torch.Tensor:
            read.append(name)
            return tensor

        return call

    tensors = {name: defer(name, tensor) for name, tensor in adapter.tensors.items()}
    monkeypatch.setattr("service.engine.loads.MODULES", 1)
    monkeypatch.setattr("service.engine.loads.LEAST_S", 0.0)
    world = World(SimpleNamespace(id=7, loras=adapter.loras, tensors=tensors))
    world.step()
    assert world.advance(7) is None
    assert not read
    world.step()
    assert world.advance(7) is None
    assert len(read) == 2
    assert world.load(7).layers == dict.fromkeys(adapter.loras, 4)
    assert sorted(read) == sorted(tensors)


def test_vllm_reads_a_file_lazily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, taken = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", dict[str, Any]()
    save_file({name: torch.eye(2)}, tmp_path / "adapter_model.safetensors")

    class Taken(LoRAModel):
        @classmethod
        def from_lora_tensors(cls, lora_model_id: int, tensors: Any, peft_helper: Any, **kwargs: Any) -> Any:
            taken.update(tensors)

    monkeypatch.setattr("vllm.lora.lora_model.safetensors", loads.LazyFiles)
    Taken.from_local_checkpoint(str(tmp_path), {"q_proj"}, SimpleNamespace(modules_to_save=None), lora_model_id=1)
    assert torch.equal(taken[name](), torch.eye(2))
