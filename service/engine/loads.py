"""Loading an adapter in slices, in the workers: between two steps of the engine no more than a short one, so that those
who are being answered do not feel it.

vLLM reads an adapter, copies it into a slot and packs nothing, in one go inside the engine's loop. Here the files are
read and each layer is checked and, on CPUs, packed for the kernel, a slice after each step; while no step is computed,
the slices follow each other at once. What is packed stays with the adapter: giving it a slot copies nothing, however
often stacks and builds change places in the engine's batch.
"""

import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import Any

import safetensors
import torch
from vllm.lora import lora_model

from service.engine import special
from service.engine.factors import PackedLayer, pack
from service.engine.slices import LayerPunica, find_language_wrapper
from service.engine.supported import require

SHARE = 0.1
"""Of the time of a step, what a slice between two steps may take."""
LEAST_S, MOST_S = 0.002, 0.02
IDLE_S = 0.05
"""Without a step for so long, nothing is computed: calls of two slices may come before the same step."""
MODULES = 16
"""Modules whose tensors are made into layers at once."""
Packs = dict[int, PackedLayer | None]
"""An adapter's packed layers, by the address of the layer's first factors; None for those that it lacks."""


@dataclass(slots=True)
class Report:
    """What a worker says of an adapter that it has loaded."""

    layers: dict[str, int] = field(default_factory=dict)
    """Those of its layers that this worker has, with their rank."""
    missing: list[str] = field(default_factory=list)
    """See `special.find_missing`."""
    infinite: list[str] = field(default_factory=list)
    """The layers with factors that are not finite in the served dtype.

    Such an adapter would spoil tokens of its batches that do not use it: zero times infinity is NaN.
    """


def _is_finite(factors: Any) -> bool:
    """Whether all numbers are finite; `factors` is a tensor, or for packed layers one per slice, None for none."""
    return all(map(_is_finite_tensor, factors if isinstance(factors, list) else [factors]))


def _is_finite_tensor(x: torch.Tensor | None) -> bool:
    if x is None or math.isfinite(x.sum(dtype=torch.float32)):  # the sum of finite numbers may be infinite, too
        return True
    return bool(torch.isfinite(x).all())


Tensor = torch.Tensor | Callable[[], torch.Tensor]
"""One that was read, or what reads it."""


def _divide(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Parts with the tensors of `MODULES` modules, those of one module together."""
    modules = defaultdict[str, list[str]](list)
    for name in tensors:
        modules[re.sub(r"\.lora_(embedding_)?[AB]\b.*", "", name)].append(name)
    groups = list(modules.values())
    for start in range(0, len(groups), MODULES):
        yield {name: tensors[name] for name in chain.from_iterable(groups[start : start + MODULES])}


class LazyFiles:
    """What vLLM's loader takes for the module `safetensors`: files whose tensors are read only when they are called."""

    @staticmethod
    @contextmanager
    def safe_open(path: str, framework: str) -> Iterator[Any]:
        """The keys of a file, and in place of its tensors what reads them, which keeps the file open."""
        file = safetensors.safe_open(path, framework)
        yield SimpleNamespace(keys=file.keys, get_tensor=lambda key: partial(file.get_tensor, key))


class Loads:
    """The adapters that one worker is loading; `lora_manager` is vLLM's."""

    def __init__(self, lora_manager: Any) -> None:
        require(lora_model, "safetensors")
        require(lora_manager, "_load_adapter", "_lora_model_cls", "remove_adapter", "_adapter_manager")
        self._lora_manager = lora_manager
        self._manager = lora_manager._adapter_manager
        require(self._manager, "add_adapter", "activate_adapter", "remove_oldest_adapter", "list_adapters")
        require(self._manager, "capacity", "lora_index_to_id", "modules", "lora_config")
        self._wrapper = find_language_wrapper(lora_manager)
        self._scratch: dict[tuple[torch.Size, ...], tuple[torch.Tensor, ...]] = {}
        self._loads: dict[int, Iterator[None]] = {}
        self._reports: dict[int, Report] = {}
        self._packing = False
        self._steps = -1
        self._quiet = 0.0
        """When a slice last came after a step."""
        self._ended = 0.0
        self._packable = self._find_packable()
        self._skip_slots()
        self._remove = lora_manager.remove_adapter
        lora_manager.remove_adapter = self._remove_adapter

    def advance(self, request: Any) -> Report | None:
        """Do the first or next slice of loading vLLM's `request`; its report once that is done, else None."""
        id_ = request.lora_int_id
        if id_ not in self._reports:
            self._reports[id_] = Report()
            self._loads[id_] = self._load(request, self._reports[id_])
            self._ended = time.monotonic()  # how long a step takes is not known yet
        if (load := self._loads.get(id_)) is None:  # other workers are not as far
            return self._reports[id_]
        began = time.monotonic()
        steps = getattr(self._wrapper, "fusion_steps", 0)  # without the seam nobody counts them
        if self._steps != steps:
            self._steps, self._quiet = steps, began
        idle = began - self._quiet > IDLE_S
        limit = began + min(MOST_S, max(LEAST_S, SHARE * (began - self._ended)))
        try:
            for _ in load:
                if not idle and time.monotonic() >= limit:
                    return None
        except BaseException:
            self._forget(id_)
            raise
        finally:
            self._ended = time.monotonic()
        del self._loads[id_]
        return self._reports[id_]

    def _load(self, request: Any, report: Report) -> Iterator[None]:
        manager, id_ = self._manager, request.lora_int_id
        lora = yield from self._read(request)
        if len(manager) + 1 > manager.capacity:
            manager.remove_oldest_adapter()
        manager.add_adapter(lora)
        yield
        packs: Packs = {}
        for name, factors in lora.loras.items():
            if name in manager.modules:
                report.layers[name] = factors.rank
            if not (_is_finite(factors.lora_a) and _is_finite(factors.lora_b)):
                report.infinite.append(name)
            yield
        report.missing = special.find_missing(self._lora_manager, id_)
        for name, layer in self._packable.items():
            if (factors := lora.loras.get(name)) is None:
                packs[layer.lora_a_stacked[0].data_ptr()] = None
                continue
            packs[layer.lora_a_stacked[0].data_ptr()] = self._pack(layer, factors)
            yield
        if self._packable:
            kept = {id_: packs, **self._wrapper.fusion_packs}
            self._wrapper.fusion_packs = {i: kept[i] for i in kept.keys() & manager.list_adapters().keys()}
        if None in manager.lora_index_to_id:  # otherwise the step that uses it takes the slot of another
            manager.activate_adapter(id_)

    def _read(self, request: Any) -> Generator[None, None, Any]:
        """vLLM's model of the adapter: its own checks and reading, whose last part, making layers of tensors, is done
        for a few of them at a time.
        """
        stock, held = self._lora_manager._lora_model_cls, list[tuple[dict[str, Tensor], Any, dict[str, Any]]]()

        class Deferred(stock):  # type: ignore[misc, valid-type]  # vLLM's class, as it is now
            @classmethod
            def from_lora_tensors(cls, lora_model_id: int, tensors: Any, peft_helper: Any, **kwargs: Any) -> Any:
                held.append((tensors, peft_helper, kwargs))
                return stock(lora_model_id, peft_helper.r, {})

        self._lora_manager._lora_model_cls, lora_model.safetensors = Deferred, LazyFiles
        try:
            lora = self._lora_manager._load_adapter(request)
        finally:
            self._lora_manager._lora_model_cls, lora_model.safetensors = stock, safetensors
        yield
        for tensors, helper, kwargs in held:
            for part in _divide(tensors):
                read = {name: tensor() if callable(tensor) else tensor for name, tensor in part.items()}
                made = stock.from_lora_tensors(lora.id, read, helper, **kwargs)
                lora.loras.update(made.loras)
                if made.modules_to_save:  # which vLLM has checked of none
                    raise ValueError(f"the adapter has whole layers: {', '.join(made.modules_to_save)}")
                yield
        return lora

    def _pack(self, layer: Any, factors: Any) -> PackedLayer | None:
        """The factors as the layer's own `set_lora` lays them out, in a slot of no batch."""
        stacked = layer.lora_a_stacked, layer.lora_b_stacked
        key = tuple(t.shape[1:] for t in (*stacked[0], *stacked[1]))
        if key not in self._scratch:
            self._scratch[key] = tuple(t.new_zeros(1, *t.shape[1:]) for t in (*stacked[0], *stacked[1]))
        own = factors.lora_a if isinstance(factors.lora_a, list) else [factors.lora_a]
        rank, count = max((len(a) for a in own if a is not None), default=0), len(stacked[0])
        whole = self._scratch[key]  # of which the zeros from `rank` on need neither be written nor read
        scratch = *(a[:, :, :rank] for a in whole[:count]), *(b[..., :rank] for b in whole[count:])
        layer.lora_a_stacked, layer.lora_b_stacked = scratch[:count], scratch[count:]
        self._packing = True
        for part in scratch:
            part.zero_()
        try:
            type(layer).set_lora(layer, 0, factors.lora_a, factors.lora_b)
            return pack(scratch[:count], scratch[count:], layer.output_slices, 0)
        finally:
            layer.lora_a_stacked, layer.lora_b_stacked = stacked
            self._packing = False

    def _find_packable(self) -> dict[str, Any]:
        """The dense layers whose factors are read from packs alone: those of the CPU's wrapper."""
        if not hasattr(self._wrapper, "fusion_packs") or self._manager.lora_config.fully_sharded_loras:
            return {}
        modules = self._manager.modules.items()
        return {name: layer for name, layer in modules if isinstance(layer.punica_wrapper, LayerPunica)}

    def _skip_slots(self) -> None:
        """Have layers copy nothing into the slot of an adapter that is packed."""

        def needs_slot(index: int) -> bool:
            return not self._packing and self._manager.lora_index_to_id[index] not in self._wrapper.fusion_packs

        def patch(layer: Any) -> None:
            def fill(index: int, *args: Any, **kwargs: Any) -> None:
                if needs_slot(index):
                    type(layer).set_lora(layer, index, *args, **kwargs)

            def clear(index: int) -> None:
                if needs_slot(index):
                    type(layer).reset_lora(layer, index)

            layer.set_lora, layer.reset_lora = fill, clear

        for layer in self._packable.values():
            require(layer, "set_lora", "reset_lora", "output_slices", "lora_a_stacked", "lora_b_stacked")
            patch(layer)

    def _remove_adapter(self, id_: int) -> Any:
        self._forget(id_)
        removed = self._remove(id_)
        if self._packable:
            self._wrapper.fusion_packs.pop(id_, None)
        return removed

    def _forget(self, id_: int) -> None:
        self._loads.pop(id_, None)
        self._reports.pop(id_, None)
