"""The layers of the base that a LoRA may change, which of them are served built, and which this engine cannot serve."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from adapters import MAX_GATE_BYTES, AdapterError, LoraAdapter, Readout, did_you_mean
from service.engine.names import EMBEDDING, EXPERTS, HEAD, STACKED_EXPERTS

Shapes = Mapping[str, tuple[int, int]]

_EXPERT = re.compile(r"(.*\.experts)\.(0|[1-9][0-9]{0,4})\.(gate_proj|up_proj|down_proj)")
_WAY_OUT = "merge the adapter into the base (PEFT's merge_and_unload) and serve the result, or train it without"


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of one layer: how many, and their shapes (d_out, d_in) by projection."""

    count: int
    shapes: Shapes


@dataclass(frozen=True)
class BaseLayers:
    """What a LoRA may change, by the base's own module names: shapes (d_out, d_in) as adapters have them."""

    dense: Shapes
    """Every linear layer but the output head: what can be mixed."""
    head: Shapes = field(default_factory=dict)
    """The output head, at most one."""
    embedding: Shapes = field(default_factory=dict)
    """The embedding of tokens, at most one: (size of the vectors, size of the vocabulary)."""
    experts: Mapping[str, Experts] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    """Why an adapter on one of these layers cannot be served, by name."""

    @cached_property
    def expert_shapes(self) -> Shapes:
        """The projections of every expert, `….experts.3.gate_proj`."""
        return {
            f"{layer}.{number}.{projection}": shape
            for layer, experts in self.experts.items()
            for number in range(experts.count)
            for projection, shape in experts.shapes.items()
        }

    @cached_property
    def shapes(self) -> Shapes:
        """All layers, experts one by one."""
        return {**self.dense, **self.head, **self.embedding, **self.expert_shapes}

    def check(self, adapter: LoraAdapter) -> None:
        """Raise `AdapterError` unless the base has every layer of `adapter`, in its shape, and the engine serves it."""
        for name, facts in adapter.facts.items():
            shape = self.shapes.get(name)
            if shape is None:
                hint = did_you_mean(name, self.shapes) or "the adapter was trained on another base"
                raise AdapterError("shape", f"the base has no linear layer {name!r}: {hint}")
            if shape != facts.shape or (name in self.embedding) != facts.is_embedding:
                message = f"{name!r} is {facts.shape}, the base's layer {shape} (d_out, d_in): it is of another base"
                raise AdapterError("shape", message)
            layer = match[1] if (match := _EXPERT.fullmatch(name)) else name
            if layer in self.refused:
                raise AdapterError("layer", self.refused[layer])
        if adapter.gate is not None:
            self._check_gate(adapter, adapter.gate)

    def _check_gate(self, gate: LoraAdapter, readout: Readout) -> None:
        for _, vocabulary in self.embedding.values():
            readout.check_vocabulary(vocabulary)
        if layers := self.list_built(gate):
            raise AdapterError("gate", f"a gate acts on dense layers only, which can be mixed; this one has {layers}")
        if gate.nbytes > MAX_GATE_BYTES:
            raise AdapterError("gate", f"the gate has {gate.nbytes} bytes: expected at most {MAX_GATE_BYTES}")

    def list_built(self, adapter: LoraAdapter) -> str:
        """The layers of `adapter` that are served built, for messages; empty when all can be mixed.

        The weights of a mix act on the coordinates of dense layers alone.
        """
        names = [name for name in adapter.facts if name in self.head or name in self.embedding]
        return ", ".join([*names, *["experts"] * any(name in self.expert_shapes for name in adapter.facts)])


def find_layers(model: Any, prefix: str = "") -> BaseLayers:
    """The layers of transformers' `model`, whose tensors need no memory: those whose names begin with `prefix`, and its
    two ends.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    dense, heads, embeddings, experts = {}, {}, {}, {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            shape = (module.out_features, module.in_features)
            if module is head:
                heads[name] = shape
            elif name.startswith(prefix):
                dense[name] = shape
        elif isinstance(module, torch.nn.Embedding) and module is embedding:
            embeddings[name] = (module.embedding_dim, module.num_embeddings)
        elif name.endswith(".experts") and (found := _read_experts(module)) is not None:
            experts[name] = found
    return BaseLayers(dense, heads, embeddings, experts)


def _read_experts(module: Any) -> Experts | None:
    """The experts of a layer whose gate and up projections are one parameter [count, 2·d_expert, d], the gate first;
    None for other forms, such as those whose rows take turns.
    """
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(gate_up, torch.Tensor) or not isinstance(down, torch.Tensor) or gate_up.ndim != 3:
        return None
    count, width, d = gate_up.shape
    if tuple(down.shape) != (count, d, width // 2) or getattr(module, "is_transposed", False):
        return None
    shape = (width // 2, d)
    return Experts(count, {"gate_proj": shape, "up_proj": shape, "down_proj": (d, width // 2)})


def refuse_unserved(layers: BaseLayers, served: Mapping[str, str], why_no_head: str | None) -> BaseLayers:
    """`layers` with those refused that the engine does not adapt, or wrongly.

    `served` has the kind (HEAD, …) of what it adapts besides dense layers, by its own name of the layer;
    `why_no_head` says in which circumstance its output head would be wrong.
    """
    return replace(layers, refused=dict(_list_refused(layers, served, why_no_head)))


def _list_refused(layers: BaseLayers, served: Mapping[str, str], why_no_head: str | None) -> Iterator[tuple[str, str]]:
    for kind, names in ((HEAD, layers.head), (EMBEDDING, layers.embedding), (EXPERTS, layers.experts)):
        for name in names:
            if _is_served(name, kind, served):
                if kind == HEAD and why_no_head is not None:
                    yield name, f"this vLLM has no LoRA on the {kind} {name!r} {why_no_head}: {_WAY_OUT}"
            elif kind == EXPERTS and _is_served(name, STACKED_EXPERTS, served):
                yield (
                    name,
                    f"this vLLM takes one adapter's stacked factors for {name!r} of this base: to serve fusions, start "
                    "the server with --enable-mixed-moe-lora-format in FUSION_ENGINE_ARGS",
                )
            else:
                yield name, f"this vLLM has no LoRA on the {kind} {name!r} of this base: {_WAY_OUT}"


def _is_served(name: str, kind: str, served: Mapping[str, str]) -> bool:
    last = name.rpartition(".")[2]
    return any(other == kind and layer.rpartition(".")[2] == last for layer, other in served.items())
