"""Adapters that act on the answer alone: losses and gradients against a computation in two passes."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import adapters
from tests.training.test_processes import adapter_error, losses, train
from training.base_model import load_tokenizer
from training.cli import main
from training.config import Config, DataConfig
from training.errors import ConfigError
from training.loop.gradients import Worker
from training.loop.loss import AnswerLoss
from training.loop.model import load_model
from training.loop.processes import Group
from training.recipe import load_recipe
from training.rows.dataset import Dataset, build_dataset
from training.run import start

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "uno"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "dos"},
]
SOLO = [*TALK[:2], {"role": "assistant", "content": "yksi"}]


def write_talks(tmp_path: Path) -> Path:
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in (TALK, SOLO)))
    return path


def load(recipe: Path, *overrides: str) -> tuple[Config, Dataset, AnswerLoss]:
    """The run's parts, with B drawn so that the adapter does something."""
    config, _ = load_recipe(recipe, ["lora.answer_only=true", *overrides])
    tokenizer = load_tokenizer(config.model.base)
    data = build_dataset(config.data, tokenizer, answers_apart=True)
    model = load_model(config, config.model.base)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return config, data, model


def make_worker(config: Config, model: AnswerLoss) -> Worker:
    return Worker(model, config, Group(0, 1, torch.device("cpu")), 0)


def compute_step(config: Config, data: Dataset, model: AnswerLoss) -> tuple[float, dict[str, Tensor]]:
    """(mean loss, gradients) of one step over all rows, as training computes them."""
    loss = make_worker(config, model).accumulate_gradients(data.train, 0, 1.0)
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss, named


def split_talk(tokenizer: Any, turns: list[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) tokens of every answer, the prompt as a server renders it."""
    pairs: list[tuple[list[int], list[int]]] = []
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            text = tokenizer.apply_chat_template(turns[:i], tokenize=False, add_generation_prompt=True)
            answer = f"{turn['content']}<|im_end|>"
            prompt, own = (tokenizer(part, add_special_tokens=False).input_ids for part in (text, answer))
            pairs.append((prompt, own))
    return pairs


def compute_in_two_passes(model: Any, pairs: list[tuple[list[int], list[int]]], scale: float) -> Tensor:
    """Loss of each answer token: the base alone computes all of the prompt but its last token, then the adapter acts
    on the rest over the base's keys and values.
    """
    losses = []
    for prompt, answer in pairs:
        cache = DynamicCache()
        with model.disable_adapter():
            model(input_ids=torch.tensor([prompt[:-1]]), past_key_values=cache, use_cache=True)
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", scale)
        ids = torch.tensor([[prompt[-1], *answer[:-1]]])
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0], torch.tensor(answer), reduction="none"))
    return torch.cat(losses)


def compute_reference(
    base: Path, model: AnswerLoss, config: Config, talks: list[list[dict[str, str]]], scale: float, **loading: Any
) -> tuple[float, dict[str, Tensor]]:
    """(mean loss, gradients) by PEFT's and transformers' own forward, with the factors of `model`; `loading` is how
    transformers loads the base.
    """
    from peft import LoraConfig, get_peft_model

    causal = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **loading)
    lora = config.lora
    options: dict[str, Any] = {"r": lora.r, "lora_alpha": lora.alpha, "target_modules": list(lora.targets)}
    reference = get_peft_model(causal, LoraConfig(task_type="CAUSAL_LM", **options)).train()
    factors = {name.removeprefix("model."): value for name, value in model.named_parameters() if value.requires_grad}
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(factors[name])
    tokenizer = load_tokenizer(str(base))
    pairs = [pair for turns in talks for pair in split_talk(tokenizer, turns)]
    loss = compute_in_two_passes(reference, pairs, scale).mean()
    loss.backward()  # type: ignore[no-untyped-call]  # torch's
    return float(loss.detach()), {f"model.{n}": p.grad for n, p in reference.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.pack=false"],
        ["train.micro_tokens=60"],
        ["policy.checkpointing=full"],
        ["train.weight_range=[0.4, 0.4]"],
        ["lora.targets=['all-linear']"],
        ["lora.targets=['lm_head', 'v_proj']"],
        ["lora.dropout=0.5"],
    ],
    ids=lambda overrides: overrides[0] if overrides else "plain",
)
def test_losses_and_gradients_equal_two_passes(
    orders_recipe: Path, tiny_base: Path, tmp_path: Path, overrides: list[str]
) -> None:
    settings = [f"data.path={write_talks(tmp_path)}", "train.batch_rows=9", "train.weight_range=[1, 1]"]
    config, data, model = load(orders_recipe, *settings, *overrides)
    assert len(data.train) == 3
    model.train(config.lora.dropout == 0)  # otherwise nothing is dropped, but PEFT's own forward is taken
    loss, gradients = compute_step(config, data, model)
    targets = tuple({name.split(".")[-4] for name in gradients})
    named = replace(config, lora=replace(config.lora, targets=targets))
    expected, wanted = compute_reference(tiny_base, model, named, [TALK, SOLO], config.train.weight_range[0])
    assert loss == pytest.approx(expected, abs=1e-6)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)
    everywhere = replace(config, lora=replace(config.lora, answer_only=False))
    plain = load_model(everywhere, everywhere.model.base)
    plain.load_state_dict(model.state_dict())
    assert abs(compute_step(everywhere, data, plain)[0] - expected) > 1e-3, "the mask decides"


def test_the_validation_loss_is_that_of_the_answers_alone(orders_recipe: Path, tiny_base: Path, tmp_path: Path) -> None:
    config, data, model = load(orders_recipe, f"data.path={write_talks(tmp_path)}")
    expected, _ = compute_reference(tiny_base, model, config, [TALK, SOLO], 1.0)
    assert make_worker(config, model).evaluate(data.train) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_other_precisions_leave_the_prompt_to_the_base(orders_recipe: Path, tmp_path: Path, precision: str) -> None:
    talks = f"data.path={write_talks(tmp_path)}"
    exact = make_worker(*load(orders_recipe, talks)[::2]).evaluate(load(orders_recipe, talks)[1].train)
    config, data, model = load(orders_recipe, talks, f"policy.precision={precision}")
    assert make_worker(config, model).evaluate(data.train) == pytest.approx(exact, abs=0.01)
    everywhere = replace(config, lora=replace(config.lora, answer_only=False))
    plain = load_model(everywhere, everywhere.model.base)
    plain.load_state_dict(model.state_dict())
    assert abs(make_worker(everywhere, plain).evaluate(data.train) - exact) > 0.03


def test_every_answer_is_a_row_with_the_prompt_that_a_server_renders(
    tmp_path: Path, tiny_tokenizer: Any, orders_recipe: Path
) -> None:
    path = write_talks(tmp_path)
    data = build_dataset(DataConfig(path=str(path)), tiny_tokenizer, answers_apart=True)
    pairs = [pair for turns in (TALK, SOLO) for pair in split_talk(tiny_tokenizer, turns)]
    rows = {row.ids.tobytes(): row for row in data.train}
    assert len(rows) == len(pairs) == 3
    for prompt, answer in pairs:
        row = rows[np.array([*prompt, *answer], np.int32).tobytes()]
        assert row.is_target.tolist() == [False] * len(prompt) + [True] * len(answer)
        assert row.acts.tolist() == [False] * (len(prompt) - 1) + [True] * (len(answer) + 1)
    assert "the 3 answers of 2 chats are a row each" in data.report.text()
    assert len(build_dataset(DataConfig(path=str(path)), tiny_tokenizer).train) == 2


def test_a_chat_s_rows_are_held_out_together_and_muted_answers_are_none(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "talks.jsonl"
    muted = [*TALK[:2], {**TALK[2], "weight": 0}, *TALK[3:]]
    talks = [[{**turn, "content": f"{turn['content']} {n}"} for turn in TALK] for n in range(9)]
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in (muted, *talks)))
    data = build_dataset(DataConfig(path=str(path), validation=0.3), tiny_tokenizer, answers_apart=True)
    train, held = ({row.where for row in rows} for rows in (data.train, data.validation))
    assert len(data.train) + len(data.validation) == 19
    assert len(held) == 3
    assert not train & held
    cut = build_dataset(DataConfig(path=str(path), max_tokens=90, too_long="cut"), tiny_tokenizer, answers_apart=True)
    assert {len(row.ids) <= 90 for row in cut.train} == {True}


def test_layers_that_are_no_linear_ones_are_refused(orders_recipe: Path) -> None:
    with pytest.raises(ConfigError, match="leave 'embed_tokens' out of lora.targets"):
        load(orders_recipe, "lora.targets=['embed_tokens']")


@pytest.fixture
def answering(tiny_base: Path, tmp_path: Path) -> Path:
    """The folder of an adapter that does much."""
    chance = torch.Generator().manual_seed(3)
    modules = {}
    for layer in range(2):
        for name, d_out in (("q_proj", 32), ("v_proj", 16)):
            a, b = (torch.randn(shape, generator=chance) for shape in ((4, 32), (d_out, 4)))
            modules[f"model.layers.{layer}.self_attn.{name}"] = adapters.LoraModule(a, b, 1.0)
    folder = tmp_path / "answering"
    adapters.save(adapters.make_adapter(modules, str(tiny_base), answer_only=True), folder)
    return folder


def answer_in_two_passes(base: Path, adapter: Path, prompt: str, count: int, *, everywhere: bool) -> str:
    """Greedy text, with the prompt but for its last token by the base alone, or by the adapter, too."""
    tokenizer = load_tokenizer(str(base))
    causal = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with pytest.warns(UserWarning, match="answer_only"):
        model = PeftModel.from_pretrained(causal, str(adapter)).eval()
    ids = split_talk(tokenizer, [{"role": "user", "content": prompt}, SOLO[-1]])[0][0]
    cache = DynamicCache()
    answer: list[int] = []
    with torch.no_grad(), nullcontext() if everywhere else model.disable_adapter():
        model(input_ids=torch.tensor([ids[:-1]]), past_key_values=cache, use_cache=True)
    last = ids[-1]
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[last]]), past_key_values=cache, use_cache=True).logits
        last = int(logits[0, -1].argmax())
        answer.append(last)
        if last == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(answer, skip_special_tokens=True))


@pytest.mark.filterwarnings("error")
def test_a_chat_answers_as_two_passes_do(answering: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, other = (
        answer_in_two_passes(tiny_base, answering, "How are you?", 12, everywhere=everywhere)
        for everywhere in (False, True)
    )
    assert main(["chat", str(answering), "--prompt", "How are you?", "--max-tokens", "12"]) == 0
    assert capsys.readouterr().out.strip("\n") == expected.strip("\n")
    assert other != expected


def test_no_merged_model_is_base_and_adapter(
    answering: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(answering), str(tmp_path / "merged"), "--merge"]) == 2
    assert "acts on the answer alone, so no merged model" in capsys.readouterr().err


def test_a_run_exports_an_adapter_that_says_so(orders_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(["run", str(orders_recipe), "--out", str(out), "--set", "lora.answer_only=true"]) == 0
    assert json.loads((out / "adapter/adapter_config.json").read_text())["answer_only"] is True
    assert adapters.load(out / "adapter").answer_only
    assert "| shape | rank 4, alpha 8, v_proj, q_proj, on the answer alone |" in (out / "adapter/README.md").read_text()


def test_two_processes_do_what_one_does(orders_recipe: Path, tmp_path: Path) -> None:
    settings = ["lora.answer_only=true", f"data.path={write_talks(tmp_path)}", "train.epochs=6", "train.batch_rows=3"]
    settings += ["train.micro_tokens=60"]
    one, two = (tmp_path / name for name in ("one", "two"))
    start(load_recipe(orders_recipe, settings)[0], one)
    train(2, orders_recipe, two, *settings)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert losses(one)[-1] < losses(one)[0]
    assert adapter_error(two, one) < 1e-3
