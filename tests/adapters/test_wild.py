"""What PEFT and vLLM read with the same numbers, `load` reads with those numbers, to four digits: a table of what
people have. The sources' numbers are those of the list that the project keeps of such inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import load, save
from tests.adapters import wild
from tests.adapters.wild import PREFIX, Q0, Change, configure, drop, rename, retensor, rewrite, together

CHANGE_NOTHING = configure()
READERS = {"peft": wild.peft_logits, "vllm": wild.vllm_logits}
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """An adapter: how it is trained and then changed, who else reads it, and a part of the notes on it."""

    source: str
    change: Change = CHANGE_NOTHING
    options: Mapping[str, Any] = field(default_factory=dict)
    readers: tuple[str, ...] = ("peft", "vllm")
    note: str = ""


def float8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.to(torch.float8_e4m3fn if "lora_A" in name else torch.float8_e5m2)
        for name, tensor in tensors.items()
    }


def add_stray(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    strays = {name.replace("q_proj", "o_proj"): tensor for name, tensor in tensors.items() if "q_proj" in name}
    return {**tensors, **strays}


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}


HEAD = {"target_modules": ["q_proj", "lm_head"]}
EMBEDDING = {"target_modules": ["v_proj", "embed_tokens"]}
BOTH = {"target_modules": ["embed_tokens", "lm_head"]}
PATTERNS = {
    r".*\.layers\.\d+\..*\.v_proj": 2,
    r"model\.layers\.([0-9]|1[0-9])+\.self_attn\.q_proj": 6,
}
CASES = {
    "plain": Case("", configure()),
    "rslora": Case("", configure(), {"use_rslora": True}),
    "alpha pattern": Case("", configure(), {"alpha_pattern": {"layers.1.self_attn.q_proj": 11}}),
    "bfloat16": Case("", retensor(lambda tensors: {n: t.bfloat16() for n, t in tensors.items()})),
    "no base": Case("", configure(base_model_name_or_path=None)),
    "bias all without tensors": Case("A4", configure(), {"bias": "all"}),
    "bias lora_only without tensors": Case("A4", configure(), {"bias": "lora_only"}),
    "fan_in_fan_out": Case("A5", configure(fan_in_fan_out=True)),
    "lm_head": Case("A7", configure(), HEAD),
    "lm_head with its copy": Case("A7", configure(), {**HEAD, "copies": True}, note="left out"),
    "embed_tokens": Case("A7", configure(), EMBEDDING),
    "embed_tokens with its copy": Case("A7", configure(), {**EMBEDDING, "copies": True}, note="left out"),
    "both with their copies": Case("E4", configure(), {**BOTH, "copies": True}, note="embed_tokens.base_layer"),
    "patterns": Case("A8", configure(), {"rank_pattern": PATTERNS}),
    "lora_ga": Case("A9", configure(init_lora_weights="lora_ga"), note="changes the base's weights in training"),
    "orthogonal": Case("A9", configure(init_lora_weights="orthogonal")),
    "mica": Case("A9", configure(init_lora_weights="mica")),
    "NaN dropout": Case("A17", rewrite('"lora_dropout": 0.0', '"lora_dropout": NaN')),
    "a key twice": Case("A17", rewrite('"r": 4', '"r": 9, "r": 4'), note="'r' twice"),
    "a null bias": Case("A4", configure(bias=None), readers=("vllm",)),
    "float8": Case("A17", retensor(float8)),
    "outside target_modules": Case("A18", retensor(add_stray), readers=("vllm",), note="outside target_modules"),
    "excluded": Case("A18", configure(exclude_modules=["v_proj"]), readers=("vllm",), note="2 modules are outside"),
    "another layer": Case("A18", configure(layers_to_transform=[0]), readers=("vllm",), note="2 modules are outside"),
    "outside a pattern": Case(
        "A18", configure(target_modules=r".*\.(q_proj|k_proj)"), readers=("vllm",), note="2 modules are outside"
    ),
    "inside a pattern": Case("A18", configure(target_modules=r".*\.layers\.\d\.self_attn\.(q|v)_proj")),
    "another layer of a list": Case(
        "review",
        configure(layers_to_transform=[0], layers_pattern="layers"),
        readers=("vllm",),
        note="2 modules are out",
    ),
    "lora_bias without tensors": Case("review", configure(lora_bias=True)),
    "an empty init": Case("review", configure(init_lora_weights="")),
    "a named group": Case("review", options={"rank_pattern": {r".*\.(?P<n>\d+)\.self_attn\.q_proj": 2}}),
    "no alpha": Case("review", drop("lora_alpha"), {"lora_alpha": 8}, readers=("peft",), note="no lora_alpha: PEFT's"),
    "a newer key": Case("review", configure(use_newest={"x": 1}), note="not known and not used: 'use_newest'"),
    "no prefix": Case("E1", rename(PREFIX, ""), readers=("vllm",), note="do not begin"),
    "twice the prefix": Case("E1", retensor(double), readers=("vllm",), note="wrappers"),
}
WRAPPED = {
    "compiled": rename("model.model.layers", "model._orig_mod.model.layers"),
    "compiled outside": rename("base_model", "_orig_mod.base_model"),
    "compiled layers": retensor(
        lambda tensors: {name.replace(".self_attn", "._orig_mod.self_attn"): t for name, t in tensors.items()}
    ),
    "checkpointed": rename(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "sharded": rename("base_model.model.", "_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module."),
    "data parallel": rename("base_model", "module.base_model"),
    "the adapter's name": rename(".weight", ".default.weight"),
    "several at once": together(
        rename("base_model", "module._orig_mod.base_model"), rename(".self_attn", "._orig_mod.self_attn")
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_other_readers(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    wild.train(tmp_path, **case.options)
    case.change(tmp_path)
    ours = load(tmp_path)
    found = wild.our_logits(ours)
    assert (found - wild.logits({})).abs().max() > 100 * TOLERANCE
    for reader in case.readers:
        assert (found - READERS[reader](tmp_path)).abs().max() < TOLERANCE, reader
    assert case.note in "; ".join(ours.notes)
    assert bool(case.note) == bool(ours.notes), ours.notes


@pytest.mark.parametrize("name", CASES)
def test_what_we_write_of_it_has_the_same_numbers_for_all(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    wild.train(tmp_path / "in", **case.options)
    case.change(tmp_path / "in")
    ours = load(tmp_path / "in")
    save(ours, tmp_path / "out")
    assert load(tmp_path / "out").digest == ours.digest
    assert not load(tmp_path / "out").notes
    for reader in READERS.values():
        assert (wild.our_logits(ours) - reader(tmp_path / "out")).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_of_training_are_no_part_of_names(tmp_path: Path, name: str) -> None:
    """E1: `_orig_mod.` and the like; PEFT leaves such tensors out and only warns."""
    wild.train(tmp_path, rank_pattern={"v_proj": 2})
    plain = load(tmp_path)
    WRAPPED[name](tmp_path)
    wrapped = load(tmp_path)
    assert wrapped.digest == plain.digest
    assert len(wrapped.notes) == 1


REFUSED = {
    "a trained bias": ("A4", "bias", "q_proj.bias", retensor(lambda t: {**t, f"{Q0[:-6]}.bias": torch.ones(32)})),
    "pissa": ("A9", "init", "path_initial_model", configure(init_lora_weights="pissa_niter_4")),
    "loftq": ("review", "init", "merge_and_unload", configure(init_lora_weights="loftq")),
    "a byte order mark": ("review", "bad_config", "byte order mark", rewrite("{", "\ufeff{")),
    "another trainer's tensor": (
        *("review", "not_lora", "neither a factor"),
        retensor(lambda t: {**t, f"{Q0[:-6]}.alpha": torch.ones(1)}),
    ),
    "convolutions": (
        *("review", "shape", "convolutions is not supported"),
        retensor(lambda t: {n: x[..., None, None] for n, x in t.items()}),
    ),
    "an unknown init": ("A9", "init", "does not know", configure(init_lora_weights="newest")),
    "a resized vocabulary": (
        *("A7", "modules_to_save", "full copy"),
        retensor(lambda t: {**t, f"{PREFIX}model.embed_tokens.weight": torch.ones(65, 32)}),
    ),
    "two adapters": (
        *("A7", "not_lora", r"default\.weight.*ref\.weight"),
        retensor(
            lambda t: {
                n.replace("weight", "ref.weight" if "v_proj" in n else "default.weight"): x for n, x in t.items()
            }
        ),
    ),
    "half with the prefix": (
        *("E1", "not_lora", "do not"),
        retensor(lambda t: {n.removeprefix(PREFIX) if "v_proj" in n else n: x for n, x in t.items()}),
    ),
    "one module twice": (
        *("E1", "not_lora", "of one module"),
        retensor(lambda t: {**t, **{n.replace(".self", "._orig_mod.self"): x for n, x in t.items()}}),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_its_reason(tmp_path: Path, name: str) -> None:
    _, reason, part, change = REFUSED[name]
    wild.train(tmp_path, bias="all")
    change(tmp_path)
    with pytest.raises(ValueError, match=rf"{part}.*\[{reason}\]"):
        load(tmp_path)
