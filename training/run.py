"""One run and its folder: config.json (every setting), run.json (what it was made from), metrics.jsonl, checkpoints/,
adapter/ (at the end).
"""

import importlib.metadata
import json
import platform
import subprocess
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from training import convert
from training.base_model import load_tokenizer, resolve_base
from training.card import make_card
from training.config import Config, from_json, to_json
from training.errors import ConfigError
from training.loop.checkpoints import Checkpoints
from training.loop.fit import Progress, Schedule, Watch, fit
from training.loop.gradients import Worker
from training.loop.model import load_model
from training.loop.processes import Group, distribute, join_processes
from training.metrics import mean_loss, watch_metrics
from training.rows.dataset import Dataset, build_dataset
from training.rows.encoding import set_template

CONFIG, ABOUT, ADAPTER = "config.json", "run.json", "adapter"
PACKAGES = ("torch", "transformers", "peft", "safetensors")


def start(config: Config, folder: Path, command: str = "", *, watch: Watch | None = None) -> Progress:
    """Train from the beginning to the end; ConfigError when the folder is not empty.

    `command` is recorded in the folder; `watch`, in the main process, receives the metrics of every step.
    """
    with join_processes() as group:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{str(folder)!r} is not empty: continue it with `resume`, or choose another --out")
        group.barrier()
        return _train(config, folder, group, command, watch, resume=False)


def resume(folder: Path, *, watch: Watch | None = None) -> Progress:
    """Continue from the last checkpoint, with any number of processes; ConfigError when the data have changed."""
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{str(folder)!r} is not a run: expected a folder with {CONFIG}")
    config = from_json(json.loads((folder / CONFIG).read_text()))
    with join_processes() as group:
        return _train(config, folder, group, "", watch, resume=True)


def _train(config: Config, folder: Path, group: Group, command: str, extra: Watch | None, *, resume: bool) -> Progress:
    # Data and base.
    base = resolve_base(config.model.base)
    tokenizer = load_tokenizer(base)
    set_template(tokenizer, config.model.template)
    data = build_dataset(config.data, tokenizer, answers_apart=config.lora.answer_only)
    _check_length(config, base)
    about = _describe(data, command, group)
    if resume:
        recorded = json.loads((folder / ABOUT).read_text())
        if recorded["data"] != about["data"]:
            raise ConfigError(f"the data of {str(folder)!r} have changed since it began: start a new run")
        about = recorded
    elif group.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(to_json(config), indent=1) + "\n")
        (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    # Model and loop.
    model = load_model(config, base)
    if group.is_main:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(data.report.text(), f"{trained:,} trained parameters", sep="\n", flush=True)
    distribute(model, config, group)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep, group)
    step = max(checkpoints.steps(), default=0) if resume else 0
    total = Schedule.from_config(config, len(data.train)).total
    worker = Worker(model, config, group, tokenizer.pad_token_id)
    with watch_metrics(config, folder, step, total, extra) if group.is_main else nullcontext() as watch:
        progress = fit(worker, data, checkpoints, watch=watch, resume=resume)
    # Export.
    if group.is_main:
        card = make_card(config, about, progress, mean_loss(folder))
        convert.export(folder, folder / ADAPTER, replace=True, card=card)
    group.barrier()
    return progress


def _check_length(config: Config, base: str) -> None:
    from transformers import AutoConfig

    longest = getattr(AutoConfig.from_pretrained(base), "max_position_embeddings", None)
    if longest and config.data.max_tokens > longest:
        raise ConfigError(
            f"data.max_tokens is {config.data.max_tokens}: expected at most {longest}, the base's context"
        )


def _describe(data: Dataset, command: str, group: Group) -> dict[str, Any]:
    """What a run is made from: command, code, versions, processes, data."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "command": command,
        "commit": _find_commit(),
        "versions": {"python": platform.python_version(), **versions},
        "processes": group.world_size,
        "device": str(group.device.type),
        "data": {"sha256": data.report.sha256, "rows": data.report.rows, "tokens": data.report.tokens},
    }


def _find_commit() -> str | None:
    """The commit of this code, and whether it has changed since; None when git cannot say."""

    def git(*args: str) -> str:
        command = ["git", *args]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        return git("rev-parse", "HEAD") + " with changes" * bool(git("status", "--porcelain"))
    return None
