"""The embedding, the output head and experts: what the base has, what the engine serves, the CPU's LoRA layers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig
from vllm.lora.layers import LoRAMapping

from adapters import AdapterError, LoraModule, Readout, complete_experts, make_adapter, parse, save
from service.base_model import read_fitting, read_layers
from service.engine.names import EMBEDDING, EXPERTS, HEAD, STACKED_EXPERTS
from service.engine.special import find_missing, has_head, mark_prompts
from service.groups import declared_groups
from service.layers import BaseLayers, refuse_unserved
from service.norms import INPUT_NORM, Headroom
from service.placement import Limits, place
from service.records import AdapterRecord
from service.registry import Registry
from service.resolve import Names
from service.settings import Settings
from tests.adapters.tiny import TINY
from tests.service.conftest import adapter_info, fill
from tests.service.test_seam import MAX_TOKENS, RANK, wrapper

VOCABULARY, D = TINY["vocab_size"], TINY["hidden_size"]
SERVED = {"model.embed_tokens": EMBEDDING, "lm_head": HEAD, "model.layers.0.mlp.experts": EXPERTS}


@pytest.fixture
def layers(tmp_path: Path) -> BaseLayers:
    LlamaConfig(**TINY).save_pretrained(tmp_path)
    return read_layers(str(tmp_path))


def module(d_out: int, d_in: int, *, embedding: bool = False) -> LoraModule:
    return LoraModule(torch.ones(2, d_in), torch.ones(d_out, 2), 1.0, embedding)


def test_the_ends_of_a_base_are_its_head_and_its_embedding(layers: BaseLayers) -> None:
    assert layers.head == {"lm_head": (VOCABULARY, D)}
    assert layers.embedding == {"model.embed_tokens": (D, VOCABULARY)}
    assert "lm_head" not in layers.dense
    assert layers.dense["model.layers.1.mlp.down_proj"] == (D, TINY["intermediate_size"])
    assert not layers.experts


def test_an_adapter_on_the_ends_is_built_when_the_engine_has_lora_there(layers: BaseLayers) -> None:
    both = make_adapter(
        {"lm_head": module(VOCABULARY, D), "model.embed_tokens": module(D, VOCABULARY, embedding=True)}, None
    )
    served = refuse_unserved(layers, SERVED, None)
    served.check(both)
    assert served.list_built(both) == "lm_head, model.embed_tokens"
    assert served.list_built(make_adapter({"model.layers.0.self_attn.q_proj": module(D, D)}, None)) == ""


@pytest.mark.parametrize(
    ("served", "circumstance", "message"),
    [
        ({}, None, "no LoRA on the output head 'lm_head' of this base: merge the adapter"),
        ({"model.embed_tokens": EMBEDDING}, None, "no LoRA on the output head"),
        (SERVED, "with speculative decoding", "no LoRA on the output head 'lm_head' with speculative decoding"),
    ],
)
def test_a_head_the_engine_does_not_adapt_is_refused_by_that_reason(
    layers: BaseLayers, served: dict[str, str], circumstance: str | None, message: str
) -> None:
    head = make_adapter({"lm_head": module(VOCABULARY, D)}, None)
    with pytest.raises(AdapterError, match=message):
        refuse_unserved(layers, served, circumstance).check(head)


def test_ends_of_another_size_or_kind_are_of_another_base(layers: BaseLayers) -> None:
    for wrong in (
        {"lm_head": module(VOCABULARY + 1, D)},
        {"model.embed_tokens": module(D, VOCABULARY)},
        {"model.embed_tokens": module(D, VOCABULARY - 1, embedding=True)},
    ):
        with pytest.raises(AdapterError, match="it is of another base"):
            layers.check(make_adapter(wrong, None))


def moe_layers(folder: Path) -> BaseLayers:
    Qwen3MoeConfig(**TINY, num_experts=3, moe_intermediate_size=6, head_dim=8).save_pretrained(folder)
    return read_layers(str(folder))


def test_experts_are_known_by_both_names_and_served_where_the_engine_can(tmp_path: Path) -> None:
    layers, root = moe_layers(tmp_path), "model.layers.1.mlp.experts"
    names = {f"{root}.2.gate_up_proj": module(12, D), f"{root}.0.down_proj": module(D, 6)}
    stacked = make_adapter(names, None)
    served = refuse_unserved(layers, SERVED, None)
    adapter, _ = read_fitting(lambda: stacked, served, Settings(), None)
    assert sorted(adapter.modules) == [f"{root}.0.down_proj", f"{root}.2.gate_proj", f"{root}.2.up_proj"]
    assert served.list_built(adapter) == "experts"
    for kinds, message in (({}, "no LoRA on the experts"), ({root: STACKED_EXPERTS}, "--enable-mixed-moe-lora-format")):
        with pytest.raises(AdapterError, match=message):
            read_fitting(lambda: stacked, refuse_unserved(layers, kinds, None), Settings(), None)
    with pytest.raises(AdapterError, match="no linear layer"):
        served.check(make_adapter({f"{root}.3.down_proj": module(D, 6)}, None))


def test_a_recipe_with_such_an_adapter_is_built_and_its_group_has_no_stack(tmp_path: Path) -> None:
    records = [
        AdapterRecord("plain", "a" * 64, adapter_info(2), "2026-01-01T00:00:00+00:00"),
        AdapterRecord("head", "b" * 64, adapter_info(2, built="lm_head"), "2026-01-01T00:00:00+00:00"),
    ]
    registry = fill(Registry(f"sqlite:///{tmp_path / 'r.sqlite'}", timeout_s=5), *records)
    try:
        names = Names("base", registry, max_weight=16, max_norm=1e5)
        limits = Limits(mixing=True, max_rank=16)
        mixed = place(names.resolve_recipe(parse("0.5*plain")), [], [], limits)
        built = place(names.resolve_recipe(parse("0.5*plain + 0.5*head")), [], [], limits)
        assert (mixed.kind, built.kind, built.reason) == ("stack", "build", "LoRA on lm_head cannot be mixed")
        assert declared_groups(Settings(groups=("plain+head",)), registry) == []
        assert len(declared_groups(Settings(groups=("plain",)), registry)) == 1
    finally:
        registry.close()


TOKENS = [7, 0, 8, 7, 9]
"""Adapters by id, 0 for the base; 9 has nothing on the layer."""


def filled(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(len(shape))
    factor = torch.randn(*shape, dtype=dtype)
    factor[2] = 0
    return factor


@pytest.mark.parametrize("tokens", [TOKENS, [7, 7], [0, 7], [0, 0], [9, 0]])
def test_an_embedding_reaches_the_tokens_of_its_adapter_alone(tokens: list[int]) -> None:
    b = filled(3, 1, D, RANK)
    punica = wrapper(_cpu(), [7, 8, 9], tokens)
    punica.fusion_rows[: len(tokens)] = torch.tensor([[float(token > 0)] * RANK for token in tokens])
    x, y = torch.randn(len(tokens), RANK), torch.zeros(len(tokens), D)
    punica.add_lora_embedding(y, x, b, add_input=True)
    for i, token in enumerate(tokens):
        expected = b[token - 7, 0] @ x[i] if token in (7, 8) else torch.zeros(D)
        assert torch.allclose(y[i], expected, atol=1e-5)


@pytest.mark.parametrize("tokens", [TOKENS, [7, 7], [0, 7], [0, 0], [9, 0]])
def test_a_head_reaches_the_rows_of_its_adapter_alone(tokens: list[int]) -> None:
    a, b = filled(3, 1, RANK, D), filled(3, 1, VOCABULARY, RANK)
    punica = wrapper(_cpu(), [7, 8, 9], tokens)
    x, y = torch.randn(len(tokens), D), torch.zeros(len(tokens), VOCABULARY)
    punica.add_lora_logits(y, x, a, b, 1.0)
    for i, token in enumerate(tokens):
        expected = b[token - 7, 0] @ (a[token - 7, 0] @ x[i]) if token in (7, 8) else torch.zeros(VOCABULARY)
        assert torch.allclose(y[i], expected, atol=1e-4)


def test_logits_of_a_prompt_belong_to_the_adapters_of_its_tokens() -> None:
    a, b = filled(3, 1, RANK, D), filled(3, 1, VOCABULARY, RANK)
    tokens = [8, 7, 7, 7, 0]
    punica = wrapper(_cpu(), [7, 8, 9], tokens)
    punica.update_metadata(LoRAMapping(tuple(tokens), (8, 7, 0), is_prefill=True), [7, 8, 9], 4, VOCABULARY)
    hidden = torch.randn(MAX_TOKENS, D)
    seen: list[torch.Tensor] = []

    class Runner:
        lora_manager: Any = _manager(punica)

        def _get_prompt_logprobs_dict(self, states: torch.Tensor) -> None:
            for start, stop in ((1, 3), (4, 5)):
                y = torch.zeros(stop - start, VOCABULARY)
                punica.add_lora_logits(y, states[start:stop], a, b, 1.0)
                seen.append(y)

    mark_prompts(Runner)
    Runner()._get_prompt_logprobs_dict(hidden)  # noqa: SLF001 - vLLM's name
    expected = torch.stack([b[0, 0] @ (a[0, 0] @ hidden[i]) for i in (1, 2)])
    assert torch.allclose(seen[0], expected, atol=1e-4)
    assert not seen[1].any()
    assert punica.fusion_hidden is None


def test_a_layer_that_no_worker_has_a_place_for_is_found() -> None:
    class Manager:
        modules = dict.fromkeys(["lm_head", "model.layers.0.mlp.experts", "model.layers.0.self_attn.qkv_proj"])

        def get_adapter(self, number: int) -> Any:
            names = ["lm_head", "embed_tokens", "model.layers.0.mlp.experts.base_layer", "model.layers.9.mlp.up_proj"]
            return type("Lora", (), {"loras": dict.fromkeys(names)})()

    manager = type("WorkerManager", (), {"_adapter_manager": Manager()})()
    assert find_missing(manager, 1) == ["embed_tokens"]
    assert has_head(["lm_head"])
    assert not has_head(["model.embed_tokens"])


def _cpu() -> Any:
    from service.engine.punica import MixedPunicaCPU

    return MixedPunicaCPU


def _manager(punica: Any) -> Any:
    adapters = type("Manager", (), {"punica_wrapper_mapping": {"lm": punica}, "supports_mm": False})()
    return type("WorkerManager", (), {"_adapter_manager": adapters})()


def test_vllm_stacks_the_built_experts_as_they_are(tmp_path: Path) -> None:
    """vLLM's own loader and its order of projections: gate, down, up."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import PackedLoRALayerWeights
    from vllm.lora.peft_helper import PEFTHelper

    root, count = "model.layers.0.mlp.experts", 3
    shapes = moe_layers(tmp_path / "base").expert_shapes
    some = {f"{root}.1.gate_proj": module(6, D), f"{root}.2.down_proj": module(D, 6), f"{root}.2.up_proj": module(6, D)}
    save(complete_experts(make_adapter(some, "base"), shapes), tmp_path / "built")
    names = [f"experts.{n}.{kind}" for n in range(count) for kind in ("gate_proj", "down_proj", "up_proj")]
    peft = PEFTHelper.from_local_dir(str(tmp_path / "built"), None)
    loaded = LoRAModel.from_local_checkpoint(str(tmp_path / "built"), set(names), peft, lora_model_id=1, device="cpu")
    packed = PackedLoRALayerWeights.pack_moe([loaded.get_lora(f"model.layers.0.mlp.{name}") for name in names], root)
    packed.optimize()
    for kind, a, b in zip(("gate_proj", "down_proj", "up_proj"), packed.lora_a, packed.lora_b, strict=True):
        for n in range(count):
            name = f"{root}.{n}.{kind}"
            expected = some[name].delta() if name in some else torch.zeros(shapes[name])
            assert torch.allclose(b[n] @ a[n], expected, atol=1e-5)


def test_an_embedding_is_bounded_by_one_token_s_column() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 50_000) * 0.05, torch.randn(D, 4)
    norm = Headroom(torch.float16).check(make_adapter({"e": LoraModule(a, b, 2.0, True)}, None), max_weight=16)
    largest = max(float((2.0 * b @ a[:, i]).norm()) for i in a.norm(dim=0).topk(20).indices)
    assert largest <= norm * INPUT_NORM <= 3 * largest
    with pytest.raises(AdapterError, match="overflow"):
        Headroom(torch.float16).check(make_adapter({"e": LoraModule(a, b, 2.0)}, None), max_weight=16)


@pytest.mark.parametrize(
    ("yes", "layer", "rank", "reason"),
    [
        (VOCABULARY - 1, "model.layers.0.self_attn.q_proj", 1, None),
        (VOCABULARY, "model.layers.0.self_attn.q_proj", 1, f"the token {VOCABULARY}, but the base has {VOCABULARY}"),
        (5, "lm_head", 1, "a gate acts on dense layers only"),
        (5, "model.layers.0.self_attn.q_proj", 2**14, "expected at most 1048576"),
    ],
)
def test_a_gate_is_small_and_of_this_base(
    layers: BaseLayers, yes: int, layer: str, rank: int, reason: str | None
) -> None:
    d_out, d_in = layers.shapes[layer]
    factors = LoraModule(torch.ones(rank, d_in), torch.ones(d_out, rank), 1.0)
    gate = replace(make_adapter({layer: factors}, None), gate=Readout(yes, 0))
    layers = refuse_unserved(layers, SERVED, None)
    if reason is None:
        layers.check(gate)
        return
    with pytest.raises(AdapterError, match=reason):
        layers.check(gate)
