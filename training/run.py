"""One run and its folder: config.json (every setting), run.json (what it was made from), metrics.jsonl, checkpoints/,
adapter/ (at the end).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from training import convert
from training.config import Config, ConfigError, resolved, restore
from training.loop.checkpoints import Checkpoints
from training.loop.fit import Progress, Schedule, Watch, fit
from training.loop.model import base_name, find_base, load_model, load_tokenizer
from training.loop.processes import Group, distribute, processes
from training.rows.dataset import Dataset, build
from training.rows.encoding import set_template

CONFIG, ABOUT, METRICS, ADAPTER = "config.json", "run.json", "metrics.jsonl", "adapter"
PACKAGES = ("torch", "transformers", "peft", "safetensors")


def start(config: Config, folder: Path, command: str) -> Progress:
    """Train from the beginning to the end; ConfigError when the folder holds something already."""
    with processes() as group:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{str(folder)!r} holds another run: resume it, or choose another --out")
        group.wait()
        return _train(config, folder, group, command, resume=False)


def resume(folder: Path) -> Progress:
    """Go on from the last checkpoint, with any number of processes; ConfigError when the data have changed."""
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{str(folder)!r} holds no run: expected a folder with {CONFIG}")
    config = restore(json.loads((folder / CONFIG).read_text()))
    with processes() as group:
        return _train(config, folder, group, "", resume=True)


def _train(config: Config, folder: Path, group: Group, command: str, *, resume: bool) -> Progress:
    base = find_base(config.model.base)
    tokenizer = load_tokenizer(base)
    set_template(tokenizer, config.model.template)
    data = build(config.data, tokenizer)
    _check_length(config, base)
    about = describe(data, command, group)
    if resume:
        before = json.loads((folder / ABOUT).read_text())
        if before["data"] != about["data"]:
            raise ConfigError(f"the data of {str(folder)!r} have changed since it began: start another run")
    elif group.first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(resolved(config), indent=1) + "\n")
        (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    model = load_model(config, base)
    if group.first:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(data.report.text(), f"{trained:,} trained parameters", sep="\n", flush=True)
    distribute(model, config, group)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep, group)
    done = (checkpoints.steps() or [0])[-1] if resume else 0
    total = Schedule.of(config, len(data.train)).total
    with ExitStack() as stack:
        watch = _watchers(config, folder, done, total, stack) if group.first else (lambda seen: None)
        progress = fit(model, data, config, group, checkpoints, pad=tokenizer.pad_token_id, watch=watch, resume=resume)
    if group.first:
        convert.export(folder, folder / ADAPTER, replace=True, card=card(config, folder, progress))
    group.wait()
    return progress


def _check_length(config: Config, base: str) -> None:
    from transformers import AutoConfig

    longest = getattr(AutoConfig.from_pretrained(base), "max_position_embeddings", None)
    if longest and config.data.max_tokens > longest:
        raise ConfigError(f"data.max_tokens is {config.data.max_tokens}, the base's context has {longest} tokens")


def describe(data: Dataset, command: str, group: Group) -> dict[str, Any]:
    """What a run is made from: command, code, versions, machines, data."""
    commit = None
    with suppress(OSError, subprocess.CalledProcessError):
        here = Path(__file__).parent
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
        commit = found.stdout.strip() + (" with changes" if changed.stdout.strip() else "")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "command": command,
        "commit": commit,
        "versions": {"python": platform.python_version(), **versions},
        "processes": group.world,
        "device": str(group.device.type),
        "data": {"sha256": data.report.sha256, "rows": data.report.rows, "tokens": data.report.tokens},
    }


def _step(line: str) -> float:
    """The step a line of metrics is of; of one that was cut off, none that is kept."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf


def _watchers(config: Config, folder: Path, done: int, total: int, stack: ExitStack) -> Watch:
    """Progress bar, metrics.jsonl (what lies after the checkpoint is taken off), TensorBoard, W&B."""
    from tqdm import tqdm

    path = folder / METRICS
    kept = path.read_text().splitlines() if done and path.exists() else []
    anew = path.with_suffix(".new")
    anew.write_text("".join(f"{line}\n" for line in kept if _step(line) <= done))
    anew.replace(path)
    stream = stack.enter_context(path.open("a"))
    bar = stack.enter_context(tqdm(total=total, initial=done, unit="step", desc="training", mininterval=1.0))
    boards: list[Callable[[Mapping[str, float]], None]] = []
    if config.log.tensorboard:
        boards.append(_tensorboard(folder, stack))
    if config.log.wandb:
        boards.append(_wandb(config, folder, stack))
    start = {"tokens": 0.0, "seconds": 0.0}

    def watch(seen: Mapping[str, float]) -> None:
        stream.write(json.dumps(dict(seen)) + "\n")
        stream.flush()
        spent = seen["seconds"] - start["seconds"]
        rate = (seen["tokens"] - start["tokens"]) / spent if spent else 0.0
        bar.set_postfix_str(f"loss {seen['loss']:.3f}, {rate:.0f} tokens/s", refresh=False)
        bar.update(1)
        if "validation_loss" in seen:
            bar.write(f"step {seen['step']}: validation loss {seen['validation_loss']:.4f}")
        for board in boards:
            board(seen)

    return watch


def _tensorboard(folder: Path, stack: ExitStack) -> Callable[[Mapping[str, float]], None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("log.tensorboard needs the package tensorboard: pip install tensorboard") from None
    writer: Any = stack.enter_context(SummaryWriter(str(folder / "tensorboard")))  # type: ignore[no-untyped-call]  # torch's

    def board(seen: Mapping[str, float]) -> None:
        for name, value in seen.items():
            if name != "step":
                writer.add_scalar(name, value, seen["step"])

    return board


def _wandb(config: Config, folder: Path, stack: ExitStack) -> Callable[[Mapping[str, float]], None]:
    try:
        import wandb
    except ImportError:
        raise ConfigError("log.wandb needs the package wandb: pip install wandb") from None
    run = wandb.init(project="lora-fusion", name=folder.name, dir=str(folder), config=resolved(config), resume="allow")
    stack.callback(run.finish)
    return lambda seen: run.log(dict(seen), step=int(seen["step"]))


def card(config: Config, folder: Path, progress: Progress) -> str:
    """README.md of the adapter folder: the command, data, seeds and versions it came from; no path but the
    command's own.
    """
    about = json.loads((folder / ABOUT).read_text())
    lines = (folder / METRICS).read_text().splitlines()[-10:]
    loss = sum(json.loads(line)["loss"] for line in lines) / len(lines)
    train, lora, data = config.train, config.lora, config.data
    source = data.path if data.path.startswith(("hub:", "orders:")) else os.path.basename(data.path)
    mixed = "".join(f", {share:.3g} of {os.path.basename(path)}" for path, share in data.mix.items())
    low, high = train.weight_range
    opening = f", the first {train.opening_tokens} tokens of an answer counted {train.opening_weight:g} times"
    opening *= train.opening_weight != 1
    counted = "".join(f', answers that begin "{text}" counted {many:g} times' for text, many in data.weights.items())
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    rows = [
        ("data", f"{source}{mixed}, {about['data']['rows']} rows, sha256 {about['data']['sha256'][:16]}…"),
        ("shape", f"rank {lora.r}, alpha {lora.alpha:g}{', rsLoRA' * lora.rslora}, {', '.join(lora.targets)}"),
        (
            "training",
            f"{train.epochs} epoch{'s' * (train.epochs > 1)}, {train.batch_rows} rows a step, learning rate "
            f"{train.learning_rate:g} ({train.schedule}, warm-up {train.warmup:g}), {config.policy.precision}, "
            f"adapter weight per step from {low:g} to {high:g}{opening}{counted}",
        ),
        ("seed", f"{train.seed}"),
        ("result", f"{progress.step} steps, {progress.tokens} tokens, answer loss {loss:.4f} (last ten steps)"),
        ("versions", versions),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    name = base_name(config.model.base)
    return f"# LoRA adapter for {name}\n\n```\n{about['command']}\n```\n\n| what | value |\n| --- | --- |\n{table}\n"


def register(url: str, name: str, adapter: Path) -> str:
    """Make a running service load the adapter as `name`; returns its digest. ConfigError when it does not.

    A service that asks for an API key gets the one in `REGISTER_API_KEY`.
    """
    body = json.dumps({"name": name, "path": str(adapter.resolve())}).encode()
    headers = {"content-type": "application/json"}
    if key := os.environ.get("REGISTER_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/adapters", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            digest_: str = json.load(answer)["digest"]
            return digest_
    except urllib.error.HTTPError as error:
        raise ConfigError(f"the service at {url} refused the adapter: {error.read().decode()[:400]}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"no service answers at {url}: {error}") from None
