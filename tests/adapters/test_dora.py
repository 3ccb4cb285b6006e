"""DoRA made into plain LoRA: what PEFT computes, with the error that is stated."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig

from adapters import AdapterError, FusionError, LoraAdapter, load, save
from adapters.algebra.dora import MergeReport
from adapters.cli import main
from adapters.convert import MergeDora, convert
from tests.adapters.samples import adapter
from tests.adapters.tiny import TINY, make_adapter, make_base

FORMS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 6},
    {"target_modules": ["v_proj", "up_proj"], "lora_alpha": 3, "use_rslora": True, "rank_pattern": {"up_proj": 5}},
    {"target_modules": ["embed_tokens", "o_proj"]},
    {"target_modules": ["lm_head"]},
]


def merge(folder: Path, **limits: Any) -> tuple[LoraAdapter, MergeReport]:
    change = MergeDora(folder / "base", **limits)
    merged = convert(folder / "dora", folder / "plain", changes=[change]).adapter
    assert load(folder / "plain").digest == merged.digest
    return merged, change.reports[0]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "+".join(form["target_modules"]))
def test_at_full_rank_it_is_what_peft_computes(form: dict[str, Any], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    changes = make_adapter(base, LoraConfig(r=4, use_dora=True, **form), tmp_path / "dora")
    merged, report = merge(tmp_path, max_error=0)
    assert sorted(merged.modules) == sorted(changes)
    assert report.error < 1e-6
    for name, change in changes.items():
        expected = change.T if merged.modules[name].is_embedding else change
        assert (merged.delta(name) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "+".join(form["target_modules"]))
@pytest.mark.parametrize("limits", [{"rank": 3}, {"max_error": 0.3}, {"rank": 2, "max_error": 0.9}])
def test_the_error_is_the_smallest_there_is_and_is_stated(
    form: dict[str, Any], limits: dict[str, Any], tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base")
    changes = make_adapter(base, LoraConfig(r=4, use_dora=True, **form), tmp_path / "dora")
    merged, report = merge(tmp_path, **limits)
    lost = total = 0.0
    for row in report.modules:
        change, module = changes[row.module], merged.modules[row.module]
        sigma = torch.linalg.svdvals(change)
        best = float(sigma[row.rank :].norm() / sigma.norm())
        gap = merged.delta(row.module).double() - (change.T if module.is_embedding else change)
        assert row.error == pytest.approx(float(gap.norm() / change.norm()), rel=1e-3)
        assert row.error == pytest.approx(best, rel=1e-3)
        assert row.rank <= limits.get("rank", 99)
        if "rank" not in limits:
            assert row.error <= limits["max_error"] < float(sigma[row.rank - 1 :].norm() / sigma.norm())
        lost, total = lost + float(gap.norm()) ** 2, total + float(change.norm()) ** 2
    assert report.error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert f"{report.error:.3g} in all" in report.table()


def test_dora_is_refused_with_the_way_out(tmp_path: Path) -> None:
    make_adapter(make_base(tmp_path / "base"), LoraConfig(r=4, use_dora=True, **FORMS[2]), tmp_path / "dora")
    with pytest.raises(AdapterError, match="lora-fusion convert --merge-dora BASE"):
        load(tmp_path / "dora")


def test_a_base_whose_two_ends_are_one_matrix_has_a_head(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", LlamaConfig(**TINY, tie_word_embeddings=True))
    make_adapter(base, LoraConfig(r=4, use_dora=True, target_modules=["lm_head"]), tmp_path / "dora")
    merged, _ = merge(tmp_path, max_error=0)
    assert merged.shapes == {"lm_head": (60, 16)}


def test_what_cannot_be_merged_is_refused_by_reason(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_base(tmp_path / "other", LlamaConfig(**TINY | {"hidden_size": 32}))
    make_adapter(base, LoraConfig(r=4, use_dora=True, **FORMS[0]), tmp_path / "dora")
    save(adapter(1), tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    for folder, weights, reason in (
        ("plain", "base", "no DoRA"),
        ("dora", "nowhere", "is not a folder"),
        ("dora", "empty", "has no model.safetensors"),
        ("dora", "other", "of another base"),
    ):
        with pytest.raises(AdapterError, match=reason):
            convert(tmp_path / folder, tmp_path / "out", changes=[MergeDora(tmp_path / weights, rank=4)])
    limits: list[dict[str, Any]] = [{}, {"rank": 0}, {"max_error": 1.0}, {"max_error": float("nan")}]
    for wrong in limits:
        with pytest.raises(FusionError):
            MergeDora(tmp_path / "base", **wrong)


def test_the_command_states_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_adapter(make_base(tmp_path / "base"), LoraConfig(r=4, use_dora=True, **FORMS[0]), tmp_path / "dora")
    command = ["convert", str(tmp_path / "dora"), "--out", str(tmp_path / "plain")]
    assert main([*command, "--rank", "3"]) == 2
    assert main([*command, "--merge-dora", str(tmp_path / "base")]) == 2
    assert "--max-error" in capsys.readouterr().err
    assert main([*command, "--merge-dora", str(tmp_path / "base"), "--max-error", "0.3", "--json"]) == 0
    dora = json.loads(capsys.readouterr().out)["dora"]
    assert 0 < dora["error"] <= 0.3
    assert {row["module"] for row in dora["modules"]} == set(load(tmp_path / "plain").modules)
