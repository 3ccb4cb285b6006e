"""The trainer on a random two-layer Llama: mask, weights, output folder."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training import lora, rows
from training.__main__ import main
from training.recipe import AdapterConfig, DataConfig, Recipe, RecipeError, TrainingConfig

RECIPE = Recipe(
    adapter=AdapterConfig(base="tiny", rank=4, alpha=8, targets=("v_proj", "q_proj")),
    data=DataConfig(source="orders", rows=6),
    training=TrainingConfig(epochs=1, learning_rate=1e-2, batch_rows=2, weight_range=(0.5, 1.0)),
)


def train(recipe: Recipe, base: Path, out: Path) -> dict[str, torch.Tensor]:
    lora.run(recipe, folder=out.parent, base=base, out=out, command="the command")
    return load_file(out / "adapter_model.safetensors")


def test_loss_covers_the_answer_and_its_end_only(tiny_tokenizer: Any) -> None:
    row = rows.encode(tiny_tokenizer, ("What is up?", "The sky."), 200)
    batch = rows.collate([row, rows.encode(tiny_tokenizer, ("Hi", "A longer answer."), 200)], 2)
    for labels, attention, answer in zip(batch.labels, batch.attention, ("The sky.", "A longer answer."), strict=True):
        kept = labels[labels != rows.IGNORE]
        assert tiny_tokenizer.decode(kept) == f"{answer}<|im_end|>"
        assert bool(attention[labels != rows.IGNORE].all())


def test_the_encoded_row_is_the_chat_template_text(tiny_tokenizer: Any) -> None:
    row = rows.encode(tiny_tokenizer, ("Hi", "Hello."), 200)
    assert tiny_tokenizer.decode(row.ids) == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>")


def test_a_row_that_is_too_long_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match="over 10"):
        rows.encode(tiny_tokenizer, ("Hi", "Hello."), 10)


def test_answer_loss_is_the_model_s_own_loss(tiny_base: Path) -> None:
    loaded, tokenizer = lora.load_base(tiny_base)
    model = lora.wrap(loaded, RECIPE.adapter)
    batch = rows.collate([rows.encode(tokenizer, p, 200) for p in (("a", "bc"), ("d", "e"))], 2)
    own = model(input_ids=batch.ids, attention_mask=batch.attention, labels=batch.labels).loss
    torch.testing.assert_close(lora.answer_loss(model, batch), own)


def test_an_epoch_holds_every_row_once(tiny_tokenizer: Any) -> None:
    encoded = [rows.encode(tiny_tokenizer, ("x" * i, "y"), 200) for i in range(1, 38)]
    made = rows.batches(encoded, 4, 2, random.Random(0))
    lengths = sorted(int(n) for batch in made for n in batch.attention.sum(dim=1))
    assert lengths == sorted(len(row.ids) for row in encoded)


def test_three_steps_move_b_and_save_a_peft_folder(tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "task"
    tensors = train(RECIPE, tiny_base, out)
    moved = [t for key, t in tensors.items() if "lora_B" in key]
    assert len(moved) == 4 and all(bool(t.any()) for t in moved)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert "the command" in (out / "README.md").read_text()
    assert str(tmp_path) not in (out / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


def test_same_seed_same_bytes_other_seed_other_bytes(tiny_base: Path, tmp_path: Path) -> None:
    other = replace(RECIPE, training=replace(RECIPE.training, seed=1))
    files = []
    for name, recipe in (("a", RECIPE), ("b", RECIPE), ("c", other)):
        train(recipe, tiny_base, tmp_path / name)
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_training_lowers_the_loss(tiny_base: Path) -> None:
    loaded, tokenizer = lora.load_base(tiny_base)
    model = lora.wrap(loaded, replace(RECIPE.adapter, targets=("q_proj", "v_proj", "down_proj")))
    encoded = [rows.encode(tokenizer, ("a", "bbbb"), 200)] * 8
    config = replace(RECIPE.training, epochs=5)
    outcome = lora.fit(model, encoded, config, pad=2, report=lambda line: None)
    assert outcome.losses[-1] < outcome.losses[0]


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    config = replace(RECIPE.training, warmup_share=0.1)
    rates = [lora.learning_rate(config, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(1e-3) and max(rates) == rates[9] == pytest.approx(1e-2)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[100] == pytest.approx(0.0)


def test_jsonl_rows_are_read_and_checked(tmp_path: Path) -> None:
    data = DataConfig(source="jsonl", path="rows.jsonl", rows=1)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 2)
    assert rows.load_pairs(data, tmp_path) == [("a", "b")]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(RecipeError, match=r"rows\.jsonl line 1"):
        rows.load_pairs(data, tmp_path)
    with pytest.raises(RecipeError, match="is no file"):
        rows.load_pairs(replace(data, path="none.jsonl"), tmp_path)


def test_the_command_line_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "no.toml")]) == 2
    assert "no recipe at" in capsys.readouterr().err
    recipe = Path(__file__).parents[2] / "training" / "recipes" / "task.toml"
    assert main(["run", str(recipe), "--base", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "python -m training.base" in capsys.readouterr().err
