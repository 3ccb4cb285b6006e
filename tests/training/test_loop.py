"""The loop on a random two-layer Llama: losses, gradients, resuming, and what stops it."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from training import run
from training.base_model import load_tokenizer
from training.config import Config
from training.errors import ConfigError, NonFiniteLossError
from training.loop.checkpoints import read_tensors
from training.loop.fit import Schedule
from training.loop.model import file_name
from training.loop.optimizers import learning_rate
from training.recipe import load_recipe
from training.rows.dataset import build_dataset
from training.rows.passes import IGNORE, make_passes


def train(recipe: Path, out: Path, *overrides: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """(metrics by step, the adapter's tensors) of a run."""
    config, _ = load_recipe(recipe, overrides)
    run.start(config, out, "the command")
    return read_metrics(out), load_file(out / "adapter/adapter_model.safetensors")


def read_metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def get_losses(rows: list[dict[str, float]]) -> list[float]:
    return [row["loss"] for row in rows]


def train_reference(config: Config, base: Path) -> tuple[list[float], dict[str, Tensor]]:
    """PEFT and transformers by their own forward and loss, rows padded, one pass a step."""
    tokenizer = load_tokenizer(str(base))
    data = build_dataset(config.data, tokenizer)
    causal = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(config.train.seed)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=config.lora.r, lora_alpha=8, target_modules=list(config.lora.targets), lora_dropout=0.0
    )
    model = get_peft_model(causal, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    schedule = Schedule.from_config(config, len(data.train))
    losses = []
    for step in range(schedule.total):
        rows = [data.train[number] for number in schedule.row_numbers(step)]
        (batch,) = make_passes(rows, 10**6, pack=False, pad=0)
        mask = torch.zeros_like(batch.ids)
        for i, length in enumerate(batch.lengths):
            mask[i, :length] = 1
        answer = model(input_ids=batch.ids, attention_mask=mask, labels=batch.labels)
        counts = [
            next((n for text, n in config.data.weights.items() if tokenizer.decode(own).startswith(text)), 1.0)
            for own in (line[line != IGNORE] for line in batch.labels)
        ]
        plain = config.train.opening_weight == 1 and set(counts) == {1.0}
        (answer.loss if plain else weighted_loss(answer.logits, batch.labels, config, counts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.train, step, schedule.total, schedule.steps_per_epoch)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(answer.loss.detach()))
    named = {file_name(f"model.{n}"): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return losses, named


def weighted_loss(logits: Tensor, labels: Tensor, config: Config, counts: list[float]) -> Tensor:
    """Mean of the answer tokens' losses, those of some answers and of each answer's beginning counted more."""
    total, whole = torch.zeros(()), 0.0
    for line, wanted, count in zip(logits.log_softmax(-1), labels.tolist(), counts, strict=True):
        place = 0
        for i, label in enumerate(wanted):
            place = place + 1 if label != IGNORE else 0
            if place:
                weight = count * (config.train.opening_weight if place <= config.train.opening_tokens else 1.0)
                total, whole = total - weight * line[i - 1, label], whole + weight
    return total / whole


M = """data.weights={'{"customer": "M' = 3}"""  # five of the twelve orders are from people whose names begin so


@pytest.mark.parametrize(
    ("pack", "opening", "more"),
    [("true", 1, []), ("false", 1, []), ("true", 6, []), ("true", 6, [M]), ("false", 1, [M])],
)
def test_twenty_steps_equal_those_of_peft_and_transformers(
    orders_recipe: Path, tiny_base: Path, tmp_path: Path, pack: str, opening: float, more: list[str]
) -> None:
    same = ["train.weight_range=[1, 1]", "train.epochs=5", "data.rows=12", f"train.pack={pack}"]
    same += [f"train.opening_weight={opening}", *more]
    rows, tensors = train(orders_recipe, tmp_path / "run", *same)
    expected, parameters = train_reference(load_recipe(orders_recipe, same)[0], tiny_base)
    assert len(expected) == 20
    assert get_losses(rows) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 0.1
    for name, parameter in parameters.items():
        torch.testing.assert_close(tensors[name], parameter, rtol=1e-3, atol=1e-5)
        assert "lora_B" not in name or bool(tensors[name].any())


def test_same_seed_same_bytes_other_seed_other_bytes(orders_recipe: Path, tmp_path: Path) -> None:
    dropout = "lora.dropout=0.1"
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(orders_recipe, tmp_path / name, dropout, f"train.seed={seed}")
    files = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_activation_checkpointing_and_padding_change_nothing(orders_recipe: Path, tmp_path: Path) -> None:
    plain = get_losses(train(orders_recipe, tmp_path / "plain")[0])
    for i, changes in enumerate(
        (["policy.checkpointing=full"], ["policy.checkpointing=selective"], ["train.micro_tokens=300"])
    ):
        assert get_losses(train(orders_recipe, tmp_path / str(i), *changes)[0]) == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-bf16"])
def test_other_precisions_learn_the_same(orders_recipe: Path, tmp_path: Path, precision: str, optimizer: str) -> None:
    exact = get_losses(train(orders_recipe, tmp_path / "exact", "train.epochs=4")[0])
    changes = [f"policy.precision={precision}", f"policy.optimizer={optimizer}", "train.epochs=4"]
    found = get_losses(train(orders_recipe, tmp_path / "run", *changes)[0])
    assert found[-1] == pytest.approx(exact[-1], rel=0.05)
    assert found[-1] < found[0] - 0.1


def test_a_resumed_run_continues_bit_for_bit(orders_recipe: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    rows, tensors = train(orders_recipe, whole, "lora.dropout=0.1", "data.validation=0.2", "checkpoint.keep=9")
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    for name in ("step-00000004", "adapter"):
        shutil.rmtree(half / (f"checkpoints/{name}" if name.startswith("step") else name))
    (half / "checkpoints/step-00000003.partial").mkdir()  # killed while writing
    run.resume(half)
    again = read_metrics(half)
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]
    assert sorted(path.name for path in (half / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    left, right = ((one / "adapter/adapter_model.safetensors").read_bytes() for one in (whole, half))
    assert left == right
    assert "validation_loss" in rows[-1]
    held = read_tensors(whole / "checkpoints/step-00000004")
    assert all("lora_" in name for name in held)
    assert len(held) == 4 * len(tensors)


def test_tensorboard_gets_every_number(orders_recipe: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows, _ = train(orders_recipe, tmp_path / "run", "log.tensorboard=true")
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(get_losses(rows), abs=1e-6)
    assert set(events.Tags()["scalars"]) == set(rows[0]) - {"step"}


def test_a_run_is_not_resumed_with_changed_data(tmp_path: Path, orders_recipe: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "answer": "b"}\n' * 4)
    train(orders_recipe, tmp_path / "run", f"data.path={data}")
    data.write_text('{"prompt": "a", "answer": "c"}\n' * 4)
    with pytest.raises(ConfigError, match="have changed"):
        run.resume(tmp_path / "run")


def test_a_loss_that_is_not_finite_names_its_rows(
    orders_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p{i}", "answer": "odd" if i == 4 else "even"} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    forward = torch.nn.functional.cross_entropy

    def spoil(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        values = forward(logits, targets, **options)
        return torch.where(targets == targets.new_tensor(tokens["odd"]), torch.nan, values)

    config, _ = load_recipe(orders_recipe, [f"data.path={data}"])
    tokenizer = load_tokenizer(config.model.base)
    tokens = {"odd": tokenizer("o", add_special_tokens=False).input_ids[0]}
    monkeypatch.setattr("training.loop.loss.functional.cross_entropy", spoil)
    with pytest.raises(NonFiniteLossError, match=r"the loss of step \d is nan, from rows\.jsonl:5: check"):
        run.start(config, tmp_path / "run", "")


def test_a_full_disk_costs_the_interval_not_the_run(
    orders_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = fail_on(monkeypatch, {2})
    train(orders_recipe, tmp_path / "run", "checkpoint.every=1")
    assert "checkpoint of step 2 could not be written" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
    fails.symmetric_difference_update({2, 4})
    with pytest.raises(OSError, match="step 4 could not be written: .*No space left"):
        train(orders_recipe, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other/checkpoints").iterdir()] == ["step-00000002"]


def fail_on(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> set[int]:
    """Make writing the checkpoints of these steps fail as on a full disk."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    write: Callable[..., Any] = FileSystemWriter.write_data

    def full(self: Any, *arguments: Any) -> Any:
        if int(str(self.path).rpartition("step-")[2][:8]) in steps:
            raise OSError(28, "No space left on device")
        return write(self, *arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    return steps


def test_a_run_whose_gradients_are_never_finite_fails(
    orders_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.loop.fit._clip", lambda *_: math.inf)
    monkeypatch.setattr("training.loop.fit.INITIAL_SCALE", 4.0)
    config, _ = load_recipe(orders_recipe, ["policy.precision=fp16", "train.epochs=3"])
    with pytest.raises(NonFiniteLossError, match="the gradients of step 3 are not finite"):
        run.start(config, tmp_path / "run", "")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [1, 1]


def test_a_truncated_line_of_metrics_is_dropped_on_resume(orders_recipe: Path, tmp_path: Path) -> None:
    config, _ = load_recipe(orders_recipe)
    run.start(config, tmp_path / "run", "")
    metrics = tmp_path / "run/metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 5, "lo')
    run.resume(tmp_path / "run")
    assert metrics.read_text() == whole
