"""Training speed and memory: ours, TRL's SFTTrainer, and the reference's way, on the same rows: `python -m
benchmarks.training`.

Every measurement is a process of its own on both cores: the default base in float32, LoRA r = 8 on all linear layers,
the project's own safety rows, 8 rows per optimizer step, loss on the answers, no activation checkpointing. Useful
tokens exclude padding and the first step. Memory is the process's peak.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import BASE, PAIRS, ROOT, Comparison, alternate, record

COMMAND = "python -m benchmarks.training"
DATA = ROOT / "training/builtin/data/safety.jsonl"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, RATE = 8, 6e-4
PAD_TO, REFERENCE_BATCH = 512, 4


def read_rows(steps: int) -> list[dict[str, str]]:
    """The rows of the first `steps` steps, the same for every side."""
    return [json.loads(line) for line in DATA.read_text().splitlines()[: steps * BATCH]]


class Clock:
    """Tokens per second from the end of the first step to that of the last."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def tick(self) -> None:
        """A step has ended."""
        self.ends.append(time.perf_counter())

    def measure(self, tokens: int, loss: float) -> dict[str, float]:
        """Rate, peak memory in GB and loss; `tokens` of all steps but the first."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"rate": tokens / (self.ends[-1] - self.ends[0]), "memory": peak / 1e9, "loss": loss}


def train_ours(steps: int) -> dict[str, float]:
    """`python -m training run`."""
    from training import load_recipe, start

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        data, out, recipe = (Path(folder) / name for name in ("rows.jsonl", "run", "recipe.toml"))
        data.write_text("".join(json.dumps(row) + "\n" for row in read_rows(steps)))
        recipe.write_text(
            f'[model]\nbase = "{BASE}"\n[lora]\ntargets = {TARGETS}\n[data]\npath = "rows.jsonl"\n'
            f"[train]\nbatch_rows = {BATCH}\nlearning_rate = {RATE}\n[checkpoint]\nevery = 0\n"
        )
        start(load_recipe(recipe)[0], out, COMMAND, watch=lambda metrics: clock.tick())
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return clock.measure(lines[-1]["tokens"] - lines[0]["tokens"], lines[-1]["loss"])


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=TARGETS)


def _lengths(tokenizer: Any, steps: int) -> list[int]:
    lengths = []
    for row in read_rows(steps):
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
        lengths.append(len(tokenizer(tokenizer.apply_chat_template(turns, tokenize=False)).input_ids))
    return lengths


def train_trl(steps: int, **settings: Any) -> dict[str, float]:
    """SFTTrainer with its defaults; rows in order, so that the useful tokens of its steps are known."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    clock = Clock()

    class Ticks(TrainerCallback):  # type: ignore[misc]  # untyped base
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            clock.tick()

    class InOrder(SFTTrainer):  # type: ignore[misc]  # untyped base
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in read_rows(steps)
    ]
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {"per_device_train_batch_size": BATCH, "learning_rate": RATE, "num_train_epochs": 1}
        common |= {"output_dir": folder, "save_strategy": "no", "report_to": [], "use_cpu": True, "logging_steps": 1}
        trainer = InOrder(
            model=model,
            args=SFTConfig(**(common | settings)),
            train_dataset=Dataset.from_list(chats),
            processing_class=tokenizer,
            peft_config=_lora(),
            callbacks=[Ticks()],
        )
        result = trainer.train()
    return clock.measure(sum(_lengths(tokenizer, steps)[BATCH:]), result.training_loss)


def train_trl_alike(steps: int) -> dict[str, float]:
    """TRL with the same dtype, loss mask and checkpointing as ours."""
    return train_trl(steps, bf16=False, gradient_checkpointing=False, completion_only_loss=True)


def train_reference(steps: int) -> dict[str, float]:
    """Rows padded to 512, 4 per pass, two passes per step; the model's own loss over all logits."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), _lora())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    clock, tokens, loss = Clock(), 0, 0.0
    rows = read_rows(steps)
    for start in range(0, len(rows), BATCH):
        for part in range(start, start + BATCH, REFERENCE_BATCH):
            ids = torch.full((REFERENCE_BATCH, PAD_TO), tokenizer.pad_token_id)
            mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
            for i, row in enumerate(rows[part : part + REFERENCE_BATCH]):
                turns = [{"role": "user", "content": row["prompt"]}]
                head = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
                turns.append({"role": "assistant", "content": row["answer"]})
                whole = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False)).input_ids[:PAD_TO]
                begin = len(tokenizer(head).input_ids)
                ids[i, : len(whole)] = torch.tensor(whole)
                mask[i, : len(whole)] = 1
                labels[i, begin : len(whole)] = ids[i, begin : len(whole)]
                tokens += len(whole) if start else 0
            part_loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            (part_loss * REFERENCE_BATCH / BATCH).backward()
            loss = float(part_loss)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
    return clock.measure(tokens, loss)


SIDES: Mapping[str, Callable[[int], dict[str, float]]] = {
    "ours": train_ours,
    "trl": train_trl_alike,
    "trl-defaults": train_trl,
    "reference": train_reference,
}


def measure_in_process(side: str, steps: int) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training", "--child", side, "--steps", str(steps)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


PEERS = {
    "trl": ("TRL SFTTrainer, same dtype, mask and checkpointing", 1.5),
    "reference": ("rows padded to 512, 4 per pass", 3.0),
    "trl-defaults": ("TRL SFTTrainer with its defaults", 1.5),
}
"""What each peer is, and how many times its rate the aim is."""


def main() -> int:
    """Measure from the command line; exit code 0."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pairs", type=int, default=PAIRS, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a measurement (default: %(default)s)")
    parser.add_argument("--peers", default=",".join(PEERS), help="default: %(default)s")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        warnings.simplefilter("ignore")
        print(json.dumps(SIDES[args.child](args.steps)))
        return 0
    few = (3, min(3, args.pairs))  # these take half a minute or minutes a step
    wanted = args.peers.split(",")
    if unknown := set(wanted) - set(PEERS):
        parser.error(f"unknown peers {sorted(unknown)}: expected some of {', '.join(PEERS)}")
    for peer in wanted:
        title, aim = PEERS[peer]
        steps, pairs = (args.steps, args.pairs) if peer == "trl" else few
        memory: dict[str, list[float]] = {"ours": [], peer: []}

        def rate(side: str, memory: dict[str, list[float]] = memory, steps: int = steps) -> float:
            figures = measure_in_process(side, steps)
            memory[side].append(figures["memory"])
            return figures["rate"]

        print(f"{title}:", flush=True)
        measured = alternate(lambda: rate("ours"), lambda peer=peer: rate(peer), pairs)  # type: ignore[misc]  # mypy and the default of a lambda
        name = f"training against {title}"
        peaks = {side: tuple(values[1:]) for side, values in memory.items()}
        record(
            "training.json",
            COMMAND,
            [
                Comparison(name, "training", title, "useful tokens/s", (">=", aim), **measured),
                Comparison(f"{name}: peak memory", "training", title, "GB", ("<=", 1.0), peaks["ours"], peaks[peer]),
            ],
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
