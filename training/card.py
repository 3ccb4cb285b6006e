"""The README.md of an adapter's folder: the command, data, seeds and versions it came from."""

import os
from collections.abc import Mapping
from typing import Any

from training.base_model import name_base
from training.config import SOURCES, Config
from training.loop.fit import Progress


def make_card(config: Config, about: Mapping[str, Any], progress: Progress, loss: float) -> str:
    """The card as Markdown; `about` is the content of run.json. The command is the only place with whole paths."""
    train, lora, data = config.train, config.lora, config.data
    rows, sha256 = about["data"]["rows"], about["data"]["sha256"]
    mixed = "".join(f", {share:.3g} of {_name_source(path)}" for path, share in data.mix.items())
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    facts = {
        "data": f"{_name_source(data.path)}{mixed}, {rows} rows, sha256 {sha256[:16]}…",
        "shape": f"rank {lora.r}, alpha {lora.alpha:g}{', rsLoRA' * lora.rslora}, {', '.join(lora.targets)}"
        + ", on the answer alone" * lora.answer_only,
        "training": f"{train.epochs} epoch{'s' * (train.epochs > 1)}, {train.batch_rows} rows per step, learning rate "
        f"{train.learning_rate:g} ({train.schedule}, warm-up {train.warmup:g}), {config.policy.precision}, "
        + _describe_weights(config),
        "seed": f"{train.seed}",
        "result": f"{progress.step} steps, {progress.tokens} tokens, answer loss {loss:.4f} (last ten steps)",
        "versions": versions,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    base = name_base(config.model.base)
    return f"# LoRA adapter for {base}\n\n```\n{about['command']}\n```\n\n| what | value |\n| --- | --- |\n{table}\n"


def _name_source(path: str) -> str:
    return path if path.startswith(SOURCES) else os.path.basename(path)


def _describe_weights(config: Config) -> str:
    train = config.train
    low, high = train.weight_range
    parts = [f"adapter weight per step from {low:g} to {high:g}"]
    if train.opening_weight != 1:
        parts.append(f"the first {train.opening_tokens} tokens of an answer counted {train.opening_weight:g} times")
    parts += [f'answers that begin "{text}" counted {weight:g} times' for text, weight in config.data.weights.items()]
    return ", ".join(parts)
