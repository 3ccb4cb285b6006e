"""Converters, the command line, and the quick look."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from transformers import AutoModelForCausalLM

import adapters
from training import convert
from training.base_model import load_tokenizer, name_base
from training.cli import main
from training.errors import ConfigError
from training.loop.checkpoints import read_tensors


def logits(model: torch.nn.Module, base: Path) -> torch.Tensor:
    ids = load_tokenizer(str(base))("some text to read", return_tensors="pt").input_ids
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(ids).logits
    return found


def test_a_run_leaves_all_that_it_was_made_from(finished: Path) -> None:
    assert {"config.json", "run.json", "metrics.jsonl", "checkpoints", "adapter"} == {
        p.name for p in finished.iterdir()
    }
    about = json.loads((finished / "run.json").read_text())
    assert about["command"].startswith("python -m training run")
    assert set(about["versions"]) >= {"torch", "peft"}
    assert len(about["data"]["sha256"]) == 64
    assert about["processes"] == 1
    readme = (finished / "adapter/README.md").read_text()
    assert "orders:12" in readme
    assert "rsLoRA" in readme
    assert str(finished.parent) not in readme.split("```")[2]
    config = json.loads((finished / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "tiny"
    assert name_base(f"{finished}/") == finished.name


def test_an_exported_checkpoint_opens_in_peft_and_merges_as_peft_does(
    finished: Path, tiny_base: Path, tmp_path: Path
) -> None:
    assert main(["export", str(finished), str(tmp_path / "a"), "--step", "2"]) == 0
    assert adapters.load(tmp_path / "a").digest != adapters.load(finished / "adapter").digest
    assert main(["export", str(finished), str(tmp_path / "merged"), "--merge", "--base", str(tiny_base)]) == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    plain = logits(base, tiny_base)
    wrapped = PeftModel.from_pretrained(base, str(finished / "adapter"))
    expected = logits(wrapped, tiny_base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, tiny_base), expected, rtol=1e-4, atol=1e-5)
    assert float((expected - plain).abs().max()) > 1e-3
    assert load_tokenizer(str(tmp_path / "merged")).chat_template


def test_an_adapter_takes_the_place_of_an_older_one(finished: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert main(["resume", str(finished), "--export", str(tmp_path / "mine")]) == 0
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {convert.WEIGHTS, convert.CONFIG, convert.CARD}


def test_a_failed_export_leaves_the_older_adapter_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    out = convert.export(finished, tmp_path / "out" / "mine")
    digest = adapters.load(out).digest
    tensors = read_tensors(convert.find_checkpoint(finished))
    next(value for name, value in tensors.items() if name.startswith("adapter.")).fill_(math.nan)
    save_sharded(tensors, checkpoint_id=str(finished / "checkpoints/step-00000009"), no_dist=True)
    with pytest.raises(adapters.AdapterError, match="NaN"):
        convert.export(finished, out, replace=True)
    assert adapters.load(out).digest == digest
    assert [path.name for path in out.parent.iterdir()] == ["mine"]


def test_a_weight_that_the_base_uses_twice_is_not_merged(tiny_base: Path, tmp_path: Path) -> None:
    head = adapters.LoraModule(torch.ones(1, 32), torch.ones(load_vocabulary(tiny_base), 1), 1.0)
    adapters.save(adapters.make_adapter({"lm_head": head}, "tiny"), tmp_path / "head")
    with pytest.raises(ConfigError, match="'lm_head', whose weight the base uses twice"):
        convert.merge(tmp_path / "head", tmp_path / "out", base=str(tiny_base))


def load_vocabulary(base: Path) -> int:
    return int(json.loads((base / "config.json").read_text())["vocab_size"])


@pytest.mark.parametrize("prefix", ["", "model.", "_fsdp_wrapped_module."])
def test_a_full_sharded_checkpoint_becomes_a_model_folder(tiny_base: Path, tmp_path: Path, prefix: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    state = {f"{prefix}{name}": value for name, value in base.state_dict().items()}
    save_sharded(state, checkpoint_id=str(tmp_path / "sharded"), no_dist=True)
    arguments = ["export", str(tmp_path / "sharded"), str(tmp_path / "out"), "--fsdp"]
    assert main(arguments) == 2
    assert main([*arguments, "--base", str(tiny_base)]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again, tiny_base), logits(base, tiny_base), rtol=0, atol=0)


def test_a_checkpoint_of_another_model_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    save_sharded({"model.layers.0.w": torch.ones(3)}, checkpoint_id=str(tmp_path / "other"), no_dist=True)
    with pytest.raises(ConfigError, match="is of another model"):
        convert.from_fsdp(tmp_path / "other", str(tiny_base), tmp_path / "out")
    with pytest.raises(ConfigError, match="is not a sharded checkpoint"):
        convert.from_fsdp(tmp_path, str(tiny_base), tmp_path / "out")
    assert not (tmp_path / "out").exists()
