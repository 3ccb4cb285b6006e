"""Gates in training: what acts where, against a plain computation; repeatability; rows, bases and texts refused."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from adapters import LoraAdapter, load
from training.cli import main
from training.config import DataConfig
from training.errors import ConfigError
from training.gates.config import GateConfig
from training.gates.model import GateModel, add_lora, load_causal
from training.gates.prefill import prefill
from training.gates.prompts import Prompt, read_both, read_prompts
from training.gates.train import train_gate

YES, NO = "y", "n"
ANSWERS = {True: "I'm sorry, but I can't.", False: "Of course."}
WORDS = ("zap", "hum")
"""What dangerous and harmless prompts of the toy rows contain."""


def write_rows(path: Path, count: int, seed: int) -> str:
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        words = [rng.choice(("up", "low", "mid")) for _ in range(rng.randint(0, 3))]
        words.insert(rng.randint(0, len(words)), WORDS[number % 2])
        rows.append({"prompt": " ".join(words), "answer": ANSWERS[number % 2 == 0]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def toy(tiny_base: Path, tmp_path: Path) -> GateConfig:
    """60 short rows on the tiny base."""
    data, held = (write_rows(tmp_path / f"{name}.jsonl", count, count) for name, count in (("rows", 60), ("held", 24)))
    options = {"yes": YES, "no": NO, "batch_rows": 10, "learning_rate": 2e-2, "epochs": 10, "dropout": 0.0}
    return GateConfig(base=str(tiny_base), data=data, held_out=held, **options)  # type: ignore[arg-type]  # of its types


def prompts_of(*lengths: int) -> list[Prompt]:
    """Prompts of these lengths that share their first three tokens."""
    rng = np.random.default_rng(0)
    return [Prompt(np.array([5, 6, 7, *rng.integers(8, 200, n - 3)], np.int32), n % 2 == 0) for n in lengths]


def measure_plainly(
    causal: Any, prompt: Prompt, factors: dict[str, tuple[Tensor, Tensor]], yes: int, no: int
) -> Tensor:
    """The value of a prompt by one whole forward pass, with hooks that add the update to the last position alone."""

    def make_hook(a: Tensor, b: Tensor) -> Callable[[Any, tuple[Tensor], Tensor], Tensor]:
        def hook(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            update = inputs[0][:, -1:] @ a.T @ b.T
            return torch.cat([output[:, :-1], output[:, -1:] + update], 1)

        return hook

    hooks = [causal.get_submodule(name).register_forward_hook(make_hook(a, b)) for name, (a, b) in factors.items()]
    logits = causal(torch.from_numpy(prompt.ids).long()[None], use_cache=False).logits[0, -1]
    for one in hooks:
        one.remove()
    logprobs = logits.log_softmax(-1)
    value: Tensor = logprobs[yes] - logprobs[no]
    return value


def test_the_value_and_its_gradient_are_those_of_an_update_at_the_last_position(tiny_base: Path) -> None:
    prompts = prompts_of(5, 9, 6, 9, 30)
    causal = load_causal(str(tiny_base))
    before = prefill(causal, prompts)
    assert before.shared == 3
    model = GateModel(add_lora(causal, GateConfig(rank=2, dropout=0.0)), 40, 50)
    torch.manual_seed(1)
    factors: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
            module, _, letter = name.removeprefix("base_model.model.").partition(".lora_")
            factors.setdefault(module, {})[letter[0]] = parameter
    weights = torch.arange(1.0, 6.0)  # so that prompts cannot be exchanged
    values = model.measure(before, range(5))
    (values * weights).sum().backward()  # type: ignore[no-untyped-call]  # torch's

    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    copies = {m: tuple(pair[x].detach().clone().requires_grad_() for x in "AB") for m, pair in factors.items()}
    expected = torch.stack([measure_plainly(plain, prompt, copies, 40, 50) for prompt in prompts])  # type: ignore[arg-type]  # pairs
    (expected * weights).sum().backward()  # type: ignore[no-untyped-call]  # torch's
    torch.testing.assert_close(values, expected, atol=2e-3, rtol=0)  # keys and values are kept in float16
    for module, pair in factors.items():
        for ours, theirs in zip((pair["A"], pair["B"]), copies[module], strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            assert float((ours.grad - theirs.grad).norm()) <= 5e-3 * float(theirs.grad.norm()) + 1e-5


def test_one_prompt_has_its_value_in_any_batch(tiny_base: Path) -> None:
    causal = load_causal(str(tiny_base))
    before = prefill(causal, prompts_of(4, 8, 17, 8))
    model = GateModel(add_lora(causal, GateConfig()), 40, 50)
    together = model.measure_all(before)
    apart = torch.cat([model.measure(before, [number]) for number in range(4)]).double()
    torch.testing.assert_close(together, apart.detach(), atol=1e-5, rtol=0)


def test_a_gate_learns_and_a_second_training_gives_the_same_bytes(toy: GateConfig, tmp_path: Path) -> None:
    report = train_gate(toy, tmp_path / "one", "the command")
    again = train_gate(toy, tmp_path / "two", "the command")
    assert report["area"]["value"] > 0.9
    assert report["area"]["low"] <= report["area"]["value"] <= report["area"]["high"]
    assert {**report, "seconds": 0} == {**again, "seconds": 0}
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_folder_is_a_gate_with_its_card(toy: GateConfig, tmp_path: Path) -> None:
    train_gate(toy, tmp_path / "risk", "the command")
    gate: LoraAdapter = load(tmp_path / "risk")
    assert gate.gate is not None
    assert gate.gate.scale > 0
    assert (gate.rank, gate.dtype, len(gate.modules)) == (1, torch.float16, 14)
    report = json.loads((tmp_path / "risk/gate.json").read_text())
    card = (tmp_path / "risk/README.md").read_text()
    for text in ("the command", "area under the curve", "false alarms at 95% recall", "12 and 12", "torch "):
        assert text in card
    assert report["readout"] == {name: getattr(gate.gate, name) for name in ("yes", "no", "scale", "offset")}
    assert str(tmp_path) not in card + json.dumps(report["settings"])


def test_an_operating_point_is_where_the_share_is_half(toy: GateConfig, tmp_path: Path) -> None:
    calibrated = train_gate(toy, tmp_path / "one")["readout"]
    moved = train_gate(replace(toy, recall=0.99), tmp_path / "two")["readout"]
    assert calibrated["scale"] == moved["scale"]
    assert calibrated["offset"] != moved["offset"]


def test_a_prompt_ends_where_the_last_answer_begins(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "Sorry, no.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (prompt,) = read_prompts(DataConfig(path=str(tmp_path / "rows.jsonl")), tiny_tokenizer).items
    text = tiny_tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, tokenize=False)
    assert tiny_tokenizer.decode(prompt.ids) == text
    assert prompt.dangerous


def test_rows_held_out_are_never_learned_from(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 40, 0)
    rows, held = read_both(GateConfig(data=path), tiny_tokenizer)
    assert {p.ids.tobytes() for p in rows.items}.isdisjoint(p.ids.tobytes() for p in held.items)
    assert len(held.items) >= 2
    with pytest.raises(ConfigError, match="all 0 prompts"):
        read_both(GateConfig(data=path, held_out=path), tiny_tokenizer)


def test_rows_that_are_left_out_are_counted(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = Path(write_rows(tmp_path / "rows.jsonl", 4, 0))
    rejected = {"prompt": "Q", "completion": "A", "label": False}
    path.write_text(path.read_text() + json.dumps({"prompt": "Q"}) + "\n" + json.dumps(rejected) + "\n")
    described = read_prompts(DataConfig(path=str(path)), tiny_tokenizer).describe()
    assert "harmless; 2 rows are left out: rows.jsonl:" in described
    assert "label is false: its answer is not one to learn" in described


BAD = [
    (["--rank", "0"], "rank is 0"),
    (["--recall", "1"], "recall is 1.0"),
    (["--yes", "yes please"], "expected one"),
    (["--targets", "no_such_layer"], "no_such_layer"),
    (["--rank", "600"], "lower --rank"),
    (["--refusal", "Never"], "are harmless"),
    (["--max-tokens", "2"], "expected at most 2"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--base", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_bad_input_ends_with_2_and_leaves_nothing(
    arguments: list[str], says: str, toy: GateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "risk"
    given = ["--base", toy.base, "--data", toy.data, "--held-out", toy.held_out, "--yes", YES, "--no", NO]
    assert main(["gate", "--out", str(out), *given, *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_the_command_prints_its_table_and_replaces_a_gate_alone(
    toy: GateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--base", toy.base, "--data", toy.data, "--yes", YES, "--no", NO, "--learning-rate", "0.02"]
    given += ["--epochs", "10", "--batch-rows", "10"]
    out = tmp_path / "risk"
    for _ in range(2):
        assert main(["gate", "--out", str(out), *given]) == 0
    printed = capsys.readouterr().out
    assert "false alarms" in printed
    assert "(a tenth)" in printed
    (out / "mine.txt").touch()
    assert main(["gate", "--out", str(out), *given]) == 2
    assert "mine.txt" in capsys.readouterr().err
