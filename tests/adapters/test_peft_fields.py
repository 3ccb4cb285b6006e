"""Every field of the installed PEFT's LoraConfig at other values than its default (r24): an adapter that was trained
with it is read with PEFT's numbers, or refused by its reason. What PEFT adds fails here until it is decided.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.tuners.lora import config as configs

from adapters import AdapterError, load
from tests.adapters import wild
from tests.adapters.wild import Change, configure

SAME = ""
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """Options of the training, a change of what is saved, and the reason of the refusal; none where it is read."""

    options: Mapping[str, Any] = field(default_factory=dict)
    outcome: str = SAME
    change: Change = field(default_factory=configure)
    note: str = ""
    base: Mapping[str, Any] = field(default_factory=dict)
    """Of the model's configuration."""
    reader: str = "peft"


def once(**options: Any) -> list[Case]:
    return [Case(options)]


def each(name: str, *values: Any) -> list[Case]:
    return [Case({name: value}) for value in values]


def refused(outcome: str, **options: Any) -> list[Case]:
    return [Case(options, outcome)]


def saved(outcome: str, **keys: Any) -> list[Case]:
    """What cannot be trained here, by the key that PEFT would save."""
    return [Case({}, outcome, configure(**keys))]


TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True}
INITS: Mapping[Any, list[Case]] = {
    True: each("init_lora_weights", True),
    False: each("init_lora_weights", False),
    "gaussian": each("init_lora_weights", "gaussian"),
    "orthogonal": each("init_lora_weights", "orthogonal"),
    "mica": each("init_lora_weights", "mica"),
    "eva": saved(SAME, init_lora_weights="eva"),
    "lora_ga": [Case({}, SAME, configure(init_lora_weights="lora_ga"), "changes the base's weights in training")],
    "pissa": refused("init", init_lora_weights="pissa"),
    "pissa_niter_[number of iters]": refused("init", init_lora_weights="pissa_niter_4"),
    "olora": refused("init", init_lora_weights="olora"),
    "corda": saved("init", init_lora_weights="corda"),
    "loftq": saved("init", init_lora_weights="loftq"),
}
FIELDS: Mapping[str, list[Case]] = {
    "task_type": each("task_type", "CAUSAL_LM"),
    "peft_type": [],  # test_other_kinds_of_adapters_are_refused
    "auto_mapping": saved(SAME, auto_mapping={"base_model_class": "X", "parent_library": "x"}),
    "peft_version": saved(SAME, peft_version="0.0.1"),
    "base_model_name_or_path": each("base_model_name_or_path", "org/base"),
    "revision": each("revision", "abc"),
    "inference_mode": each("inference_mode", True),
    "r": each("r", 1, 7),
    "target_modules": each(
        "target_modules", ["o_proj"], "all-linear", r".*\.(q|up)_proj", ["model.layers.1.mlp.down_proj"], ["lm_head"]
    ),
    "exclude_modules": each("exclude_modules", ["v_proj"], r".*layers\.0.*"),
    "lora_alpha": each("lora_alpha", 1, 2.5, -3, 64),
    "lora_dropout": each("lora_dropout", 0.5),
    "fan_in_fan_out": each("fan_in_fan_out", True),
    "bias": [
        *each("bias", "all", "lora_only"),
        *(Case({"bias": bias}, "bias", base=BIASED) for bias in ("all", "lora_only")),
    ],
    "use_rslora": each("use_rslora", True),
    "modules_to_save": refused("modules_to_save", modules_to_save=["norm"]),
    "init_lora_weights": [case for cases in INITS.values() for case in cases],
    "layers_to_transform": each("layers_to_transform", 1, [0], [0, 1]),
    "layers_pattern": once(layers_to_transform=[1], layers_pattern="layers"),
    "rank_pattern": each("rank_pattern", {"q_proj": 2}, {"proj": 2}, {r"layers\.1\..*": 6, "q_proj": 1}),
    "alpha_pattern": each("alpha_pattern", {"v_proj": 9}, {"^model.layers.0.self_attn.q_proj": 0.5}),
    "megatron_config": [Case({}, SAME, configure(megatron_config={"hidden_size": 1}), reader="vllm")],  # PEFT needs it
    "megatron_core": each("megatron_core", "other.core"),
    "trainable_token_indices": refused("trainable_tokens", trainable_token_indices=[1, 2]),
    "loftq_config": saved(SAME, loftq_config={"loftq_bits": 4}),
    "eva_config": once(eva_config=configs.EvaConfig(rho=1.0)),
    "corda_config": once(corda_config=configs.CordaConfig()),
    "lora_ga_config": once(lora_ga_config=configs.LoraGAConfig()),
    "use_dora": refused("dora", use_dora=True),
    "velora_config": [Case({"velora_config": configs.VeloraConfig(num_groups=4)}, note="that only training needs")],
    "kasa_config": refused("kasa", kasa_config=configs.KasaConfig()),
    "alora_invocation_tokens": refused("alora", alora_invocation_tokens=[3], task_type="CAUSAL_LM"),
    "use_qalora": saved("qalora", use_qalora=True),
    "qalora_group_size": each("qalora_group_size", 8),
    "monteclora_config": refused("monteclora", monteclora_config=configs.MontecloraConfig()),
    "layer_replication": refused("layer_replication", layer_replication=[[0, 1], [0, 2]]),
    "runtime_config": once(runtime_config=configs.LoraRuntimeConfig(ephemeral_gpu_offload=True)),
    "lora_bias": [Case({"lora_bias": True}, "lora_bias", base=BIASED)],
    "target_parameters": refused("target_parameters", target_parameters=["mlp.gate_proj.weight"]),
    "use_bdlora": saved("bdlora", use_bdlora={"nblocks": 2}),
    "arrow_config": saved("arrow", arrow_config={"top_k": 1}),
    "ensure_weight_tying": [
        *each("ensure_weight_tying", True),
        *(
            Case({"ensure_weight_tying": is_tied, "target_modules": targets}, base=TIED)
            for is_tied in (True, False)
            for targets in (["embed_tokens"], ["q_proj", "lm_head"], ["embed_tokens", "lm_head"], r".*(q_proj|lm_head)")
        ),
    ],
}
CASES = [pytest.param(case, id=f"{name}-{i}") for name, cases in FIELDS.items() for i, case in enumerate(cases)]


def test_every_field_is_decided() -> None:
    assert {one.name for one in dataclasses.fields(peft.LoraConfig)} == FIELDS.keys()


def test_every_initialization_is_decided() -> None:
    hint = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    words = {word for option in typing.get_args(hint) for word in typing.get_args(option)}
    assert words | {True, False, "lora_ga"} == INITS.keys()  # which its type has not


@pytest.mark.filterwarnings("ignore")  # PEFT's, about what is tried here
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_this_field_is_read_as_peft_does_or_refused(case: Case, tmp_path: Path) -> None:
    wild.train(tmp_path, model=case.base, **case.options)
    case.change(tmp_path)
    if case.outcome:
        with pytest.raises(AdapterError) as caught:
            load(tmp_path)
        assert caught.value.reason == case.outcome, caught.value
        return
    adapter = load(tmp_path)
    ours = wild.our_logits(adapter, case.base)
    theirs = wild.peft_logits(tmp_path, case.base) if case.reader == "peft" else wild.vllm_logits(tmp_path)
    assert (ours - theirs).abs().max() < TOLERANCE
    assert (ours - wild.logits({}, case.base)).abs().max() > 10 * TOLERANCE
    assert bool(case.note) == bool(adapter.notes), adapter.notes
    assert case.note in "; ".join(adapter.notes)


@pytest.mark.parametrize("kind", sorted(set(peft.PeftType) - {peft.PeftType.LORA}))
def test_other_kinds_of_adapters_are_refused(kind: peft.PeftType, tmp_path: Path) -> None:
    wild.train(tmp_path)
    configure(peft_type=kind.value)(tmp_path)
    with pytest.raises(AdapterError, match=rf"peft_type is '{kind.value}': expected 'LORA' \[not_lora\]"):
        load(tmp_path)
