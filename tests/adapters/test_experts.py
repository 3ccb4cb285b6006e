"""LoRA on experts, by PEFT's stacked names (`target_parameters`) and expert by expert."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import Qwen3MoeConfig

from adapters import (
    AdapterError,
    LoraAdapter,
    LoraModule,
    complete_experts,
    fuse,
    load,
    make_adapter,
    parse,
    save,
    split_gate_up,
)
from tests.adapters import tiny

EXPERTS, D, D_EXPERT = 4, 16, 6
CONFIG = Qwen3MoeConfig(
    **tiny.TINY, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=D_EXPERT, head_dim=8
)
FORMS: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "one": {"target_parameters": ["mlp.experts.down_proj"], "target_modules": ["q_proj"]},
    "other": {"target_parameters": ["experts.gate_up_proj"], "use_rslora": True},
    "patterns": {
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "target_modules": ["v_proj"],
        "rank_pattern": {"experts.gate_up_proj": 3},
        "alpha_pattern": {"experts.down_proj": 5},
    },
}


def experts_of(adapter: LoraAdapter, root: str, parameter: str) -> Tensor:
    """[experts, d_out, d_in], float64."""
    return torch.stack([adapter.delta(f"{root}.{expert}.{parameter}") for expert in range(EXPERTS)]).double()


def compare(adapter: LoraAdapter, changes: dict[str, Tensor]) -> None:
    """Every change that PEFT makes is the adapter's, and there is no other."""
    modules = set()
    for name, change in changes.items():
        root, _, last = name.rpartition(".")
        if root.endswith(".experts"):
            assert torch.allclose(experts_of(adapter, root, last), change, atol=1e-5), name
            modules |= {f"{root}.{expert}.{last}" for expert in range(EXPERTS)}
        else:
            assert torch.allclose(adapter.delta(name).double(), change, atol=1e-5), name
            modules.add(name)
    assert modules == set(adapter.modules)


@pytest.mark.parametrize("form", FORMS)
def test_every_expert_is_read_with_what_peft_makes_of_it(form: str, tmp_path: Path) -> None:
    base = tiny.make_base(tmp_path / "base", CONFIG)
    changes = tiny.make_adapter(base, LoraConfig(r=2, lora_alpha=6, **FORMS[form]), tmp_path / "one")
    adapter = load(tmp_path / "one")
    compare(adapter, changes)
    assert adapter.notes == ()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_fused_is_what_peft_makes_of_the_file(form: str, tmp_path: Path) -> None:
    base = tiny.make_base(tmp_path / "base", CONFIG)
    for name in "ab":
        tiny.make_adapter(base, LoraConfig(r=2, lora_alpha=6, **FORMS[form]), tmp_path / name)
    family = {name: load(tmp_path / name) for name in "ab"}
    fused, report = fuse(parse("0.6*a + -0.4*b"), family)
    assert report.exact
    save(fused, tmp_path / "fused")
    before = {name: value.detach().clone() for name, value in base.named_parameters()}
    merged = PeftModel.from_pretrained(base, tmp_path / "fused").merge_and_unload()
    changes = {
        name.removesuffix(".weight"): (v.detach() - before[name]).double() for name, v in merged.named_parameters()
    }
    compare(fused, {name: change for name, change in changes.items() if bool(change.any())})
    for name in fused.modules:
        assert torch.allclose(
            fused.delta(name), 0.6 * family["a"].delta(name) - 0.4 * family["b"].delta(name), atol=1e-5
        )


def expert(seed: int, shape: tuple[int, int], rank: int = 2) -> LoraModule:
    chance = torch.Generator().manual_seed(seed)
    return LoraModule(torch.randn(rank, shape[1], generator=chance), torch.randn(shape[0], rank, generator=chance), 0.5)


def test_the_gate_is_the_first_half_and_both_names_add_up() -> None:
    root = "model.layers.0.mlp.experts"
    stacked = make_adapter({f"{root}.1.gate_up_proj": expert(1, (2 * D_EXPERT, D))}, None)
    single = make_adapter(
        {f"{root}.1.gate_proj": expert(2, (D_EXPERT, D)), f"{root}.1.up_proj": expert(3, (D_EXPERT, D))}, None
    )
    split = split_gate_up(stacked)
    gate, up = stacked.delta(f"{root}.1.gate_up_proj").chunk(2)
    assert torch.equal(split.delta(f"{root}.1.gate_proj"), gate)
    assert torch.equal(split.delta(f"{root}.1.up_proj"), up)
    fused, _ = fuse(parse("0.5*a + 2*b"), {"a": split, "b": single})
    assert torch.allclose(
        fused.delta(f"{root}.1.gate_proj"), 0.5 * gate + 2 * single.delta(f"{root}.1.gate_proj"), atol=1e-5
    )
    assert split_gate_up(single) is single


def test_completed_experts_have_the_same_update_and_one_rank() -> None:
    root, other = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
    shapes = {
        f"{layer}.{n}.{projection}": (D, D_EXPERT) if projection == "down_proj" else (D_EXPERT, D)
        for layer in (root, other)
        for n in range(EXPERTS)
        for projection in ("gate_proj", "up_proj", "down_proj")
    }
    some = {f"{root}.1.gate_proj": expert(1, (D_EXPERT, D), 3), f"{root}.2.down_proj": expert(2, (D, D_EXPERT))}
    adapter = make_adapter({**some, "model.layers.1.self_attn.q_proj": expert(3, (D, D))}, None)
    whole = complete_experts(adapter, shapes)
    assert sum(name.startswith(root) for name in whole.modules) == 3 * EXPERTS
    assert not any(name.startswith(other) for name in whole.modules)
    assert {module.rank for name, module in whole.modules.items() if name.startswith(root)} == {3}
    for name in whole.modules:
        expected = adapter.delta(name) if name in adapter.modules else torch.zeros(shapes[name])
        assert torch.equal(whole.delta(name), expected)
    plain = make_adapter({"model.layers.1.self_attn.q_proj": expert(3, (D, D))}, None)
    assert complete_experts(plain, shapes) is plain


def test_parameters_that_are_no_experts_are_refused(tmp_path: Path) -> None:
    base = tiny.make_base(tmp_path / "base", CONFIG)
    tiny.make_adapter(base, LoraConfig(r=2, **FORMS["both"]), tmp_path / "one")
    file = tmp_path / "one/adapter_config.json"
    config = json.loads(file.read_text())
    for wrong in (["mlp.gate.weight"], "experts.gate_up_proj_bias", [1]):
        file.write_text(json.dumps(config | {"target_parameters": wrong}))
        with pytest.raises(AdapterError, match="of parameters, those of experts can be fused"):
            load(tmp_path / "one")
    file.write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(AdapterError, match="the config says rank 3"):
        load(tmp_path / "one")
