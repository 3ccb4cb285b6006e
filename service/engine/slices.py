"""Which row of a table each LoRA layer reads, in the workers.

A layer has one slice per module: a merged one (qkv, gate and up) has several. Each layer's slices are a part of the
`RowStore` of its own, which `LayerPunica` hands to vLLM's kernels with every call. It is a tensor and not a number:
compiled, all layers have the same graph, and it is read anew in every step.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from service.engine.rows import RowStore, choose_capacity
from service.engine.supported import require


def find_language_wrapper(lora_manager: Any) -> Any:
    """The LoRA layers' wrapper for the language model, whatever else the base has."""
    require(lora_manager, "_adapter_manager")
    manager = lora_manager._adapter_manager
    require(manager, "punica_wrapper_mapping", "supports_mm")
    wrappers = manager.punica_wrapper_mapping
    key = manager.mm_mapping.language_model[0] if manager.supports_mm else next(iter(wrappers))
    return wrappers[key]


class LayerPunica:
    """A layer's own door to the wrapper that all layers share: adds the layer's `rows` [slices, capacity, rank]."""

    def __init__(self, wrapper: Any, rows: torch.Tensor) -> None:
        self.wrapper = wrapper
        self.rows = rows

    def add_lora_linear(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapper's, with this layer's rows."""
        return self.wrapper.add_lora_linear(*args, rows=self.rows, **kwargs)

    def add_shrink(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapper's, with this layer's rows."""
        return self.wrapper.add_shrink(*args, rows=self.rows, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "wrapper":  # an object that is being copied has none yet
            raise AttributeError(name)
        return getattr(self.wrapper, name)


def name_slices(layer: str, packed: Mapping[str, Sequence[str]], count: int) -> list[str]:
    """The modules of a layer's `count` slices, by vLLM's names; `packed` has those of merged layers.

    With fewer modules than slices the first one has several, as in vLLM's `expand_packed_lora`.
    """
    first, *others = packed.get(layer) or [layer]
    return [first] * (count - len(others)) + others


def give_rows(lora_manager: Any, max_seqs: int) -> RowStore:
    """Give each dense layer of the language model its slices of a new store, which the wrapper gets."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    wrapper = find_language_wrapper(lora_manager)
    manager = lora_manager._adapter_manager
    require(manager, "modules", "packed_modules", "lora_config")
    layers = {
        name: layer
        for name, layer in manager.modules.items()
        if isinstance(layer, BaseLinearLayerWithLoRA) and layer.punica_wrapper is wrapper
    }
    names = [name_slices(name, manager.packed_modules, layer.n_slices) for name, layer in layers.items()]
    every, rank = [*chain.from_iterable(names)] or [""], manager.lora_config.max_lora_rank
    store = RowStore(
        every, choose_capacity(len(every), rank, max_seqs, len(wrapper.fusion_index)), rank, manager.device
    )
    start = 0
    for layer, own in zip(layers.values(), names, strict=True):
        layer.punica_wrapper = LayerPunica(wrapper, store.part(start, len(own)))
        start += len(own)
    wrapper.fusion_store = store
    return store


def patch_loading(mixin: Any) -> None:
    """Have the runner class `mixin` give its layers their rows when they are made."""
    require(mixin, "load_lora_model")
    stock: Callable[..., Any] = mixin.load_lora_model

    def load_lora_model(self: Any, model: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = stock(self, model, vllm_config, *args, **kwargs)
        give_rows(self.lora_manager, vllm_config.scheduler_config.max_num_seqs)
        return loaded

    mixin.load_lora_model = load_lora_model


def number_modules(lora_manager: Any, names: Sequence[str]) -> list[str]:
    """Say that row i of every table is that of module `names[i]`, as adapters spell it; gives those of this worker."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = getattr(lora_manager._adapter_manager.model, "hf_to_vllm_mapper", None)
    mapper = mapper if mapper is None else mapper.get_rename_mapper()
    rows: dict[str, int] = {}
    for row, name in enumerate(names):
        # As vLLM reads an adapter's tensors.
        rows.setdefault(parse_fine_tuned_lora_name(f"base_model.model.{name}.lora_A.weight", mapper)[0], row)
    return [names[row] for row in sorted(find_language_wrapper(lora_manager).fusion_store.number_modules(rows))]
