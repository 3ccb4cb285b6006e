"""A compact LoRA trainer for one process: PEFT modules, AdamW, loss on the answer tokens only."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional

from training.recipe import AdapterConfig, Recipe, TrainingConfig
from training.rows import IGNORE, Batch, Encoded, batches, encode, load_pairs

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did."""

    losses: tuple[float, ...]
    """Mean answer-token loss of each step, nats."""
    tokens: int
    """Tokens read, prompts included, padding not."""
    seconds: float


def load_base(folder: Path) -> tuple[Any, Any]:
    """The base model in float32 and its tokenizer, from a Hugging Face folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no base model at {str(folder)!r}; make it with: python -m training.base {folder}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def wrap(model: Any, config: AdapterConfig) -> PeftModel:
    """Put fresh LoRA layers (A random, B zero) into ``model``; only they are trained."""
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.targets),
        lora_dropout=config.dropout,
    )
    wrapped = get_peft_model(model, lora)
    assert isinstance(wrapped, PeftModel)
    wrapped.peft_config["default"].base_model_name_or_path = config.base
    return wrapped


def answer_loss(model: PeftModel, batch: Batch) -> Tensor:
    """Mean cross-entropy over the answer tokens of a batch, a scalar in nats.

    The output layer (a fifth of a small model) runs on the positions before answer tokens only.
    """
    causal: Any = model.get_base_model()
    hidden = causal.base_model(
        input_ids=batch.ids, attention_mask=batch.attention, use_cache=False
    ).last_hidden_state  # [rows, tokens, d]
    targets = batch.labels[:, 1:]
    wanted = targets != IGNORE
    logits = causal.get_output_embeddings()(hidden[:, :-1][wanted])  # [answer tokens, vocabulary]
    return functional.cross_entropy(logits.float(), targets[wanted])


def set_weight(model: PeftModel, weight: float) -> None:
    """Let the adapter act at ``weight`` times its own scaling."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", weight)


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """Linear warm-up, then cosine to zero; ``step`` counts from 0."""
    warmup = max(1, round(config.warmup_share * steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def fit(
    model: PeftModel,
    rows: list[Encoded],
    config: TrainingConfig,
    *,
    pad: int,
    report: Report = print,
    max_steps: int | None = None,
) -> Outcome:
    """Train the adapter inside ``model`` in place."""
    rng = random.Random(config.seed)
    plan = [b for _ in range(config.epochs) for b in batches(rows, config.batch_rows, pad, rng)]
    plan = plan[:max_steps]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=config.weight_decay)
    losses: list[float] = []
    tokens, said, began = 0, 0.0, time.monotonic()
    model.train()
    for step, batch in enumerate(plan):
        set_weight(model, rng.uniform(config.weight_range[0], config.weight_range[1]))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, len(plan))
        loss = answer_loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, config.clip_norm)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ArithmeticError(f"loss is {losses[-1]} at step {step}; lower the learning rate")
        tokens += int(batch.attention.sum())
        spent = time.monotonic() - began
        if spent - said >= 5 or step + 1 == len(plan):
            said = spent
            left = spent / (step + 1) * (len(plan) - step - 1)
            report(
                f"step {step + 1}/{len(plan)}  loss {sum(losses[-10:]) / len(losses[-10:]):.3f}  "
                f"{tokens / spent:.0f} tokens/s  {left:.0f} s left"
            )
    set_weight(model, 1.0)
    model.eval()
    return Outcome(tuple(losses), tokens, time.monotonic() - began)


def card(recipe: Recipe, command: str, rows: int, outcome: Outcome) -> str:
    """README.md of the adapter folder: the command, data, seeds and versions it came from."""
    packages = ("torch", "transformers", "peft", "safetensors")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    data, training, adapter = recipe.data, recipe.training, recipe.adapter
    tail = outcome.losses[-10:]
    return f"""# LoRA adapter for {adapter.base}

```
{command}
```

| what | value |
| --- | --- |
| data | {data.source} {data.path or f"seed {data.seed}"}, {rows} rows |
| shape | rank {adapter.rank}, alpha {adapter.alpha}, {", ".join(adapter.targets)} |
| training | {training.epochs} epoch{"s" * (training.epochs > 1)}, {training.batch_rows} rows a step, learning rate \
{training.learning_rate:g} (cosine, warm-up {training.warmup_share:g}), adapter weight per step \
from {training.weight_range[0]:g} to {training.weight_range[1]:g} |
| seed | {training.seed} |
| result | {len(outcome.losses)} steps, {outcome.tokens} tokens, {outcome.seconds:.0f} s, \
answer loss {sum(tail) / len(tail):.4f} (last ten steps) |
| versions | Python {platform.python_version()}, {versions} |

The base and the training data are the project's own or Apache-2.0; the adapter is MIT.
"""


def sort_targets(path: Path) -> None:
    """PEFT keeps target modules in a set; sort them so that the same run gives the same file."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save(model: PeftModel, out: Path, readme: str) -> None:
    """Write the PEFT folder (safetensors) in one rename, replacing an older one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        model.save_pretrained(str(temp), save_embedding_layers=False)  # "auto" asks a hub
        sort_targets(temp / "adapter_config.json")
        (temp / "README.md").write_text(readme, encoding="utf-8")
        temp.chmod(0o755)
        for path in temp.iterdir():
            path.chmod(0o644)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
            os.replace(out, old / out.name)
            shutil.rmtree(old)
        os.replace(temp, out)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def run(recipe: Recipe, *, folder: Path, base: Path, out: Path, command: str) -> Outcome:
    """Train the recipe's adapter on the model at ``base`` and save it to ``out``.

    ``folder`` is where the recipe's relative paths start.
    """
    pairs = load_pairs(recipe.data, folder)
    torch.manual_seed(recipe.training.seed)
    loaded, tokenizer = load_base(base)
    rows = [encode(tokenizer, pair, recipe.training.max_tokens) for pair in pairs]
    model = wrap(loaded, recipe.adapter)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{len(rows)} rows, {count:,} trained parameters", flush=True)
    outcome = fit(
        model,
        rows,
        recipe.training,
        pad=tokenizer.pad_token_id,
        report=lambda line: print(line, flush=True),
    )
    model.to(getattr(torch, recipe.adapter.dtype))
    save(model, out, card(recipe, command, len(rows), outcome))
    return outcome
