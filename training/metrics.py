"""Show and record the metrics of every step: progress bar, metrics.jsonl, TensorBoard, W&B."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from training.config import Config, to_json
from training.errors import ConfigError
from training.loop.fit import Watch

METRICS = "metrics.jsonl"


@contextmanager
def watch_metrics(config: Config, folder: Path, step: int, total: int, extra: Watch | None = None) -> Iterator[Watch]:
    """A watch that shows and writes the metrics of every step, and passes them to `extra`.

    Lines of metrics.jsonl after `step`, the checkpoint that the run continues from, are removed.
    """
    from tqdm import tqdm

    _truncate(folder / METRICS, step)
    with ExitStack() as stack:
        stream = stack.enter_context((folder / METRICS).open("a"))
        bar = stack.enter_context(tqdm(total=total, initial=step, unit="step", desc="training", mininterval=1.0))
        watches = [extra] if extra else []
        if config.log.tensorboard:
            watches.append(_tensorboard(folder, stack))
        if config.log.wandb:
            watches.append(_wandb(config, folder, stack))
        start = {"tokens": 0.0, "seconds": 0.0}

        def watch(metrics: Mapping[str, float]) -> None:
            stream.write(json.dumps(dict(metrics)) + "\n")
            stream.flush()
            seconds = metrics["seconds"] - start["seconds"]
            rate = (metrics["tokens"] - start["tokens"]) / seconds if seconds else 0.0
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {rate:.0f} tokens/s", refresh=False)
            bar.update(1)
            if "validation_loss" in metrics:
                bar.write(f"step {metrics['step']}: validation loss {metrics['validation_loss']:.4f}")
            for other in watches:
                other(metrics)

        yield watch


def mean_loss(folder: Path, steps: int = 10) -> float:
    """Mean loss of the last steps of a run."""
    lines = (folder / METRICS).read_text().splitlines()[-steps:]
    losses: list[float] = [json.loads(line)["loss"] for line in lines]
    return sum(losses) / len(losses)


def _truncate(path: Path, step: int) -> None:
    """Leave only the lines up to `step`."""
    lines = path.read_text().splitlines() if step and path.exists() else []
    new = path.with_suffix(".new")
    new.write_text("".join(f"{line}\n" for line in lines if _read_step(line) <= step))
    new.replace(path)


def _read_step(line: str) -> float:
    """The step of a line of metrics; infinity when the line was cut off."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf


def _tensorboard(folder: Path, stack: ExitStack) -> Watch:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("log.tensorboard needs the package tensorboard: pip install tensorboard") from None
    writer: Any = stack.enter_context(SummaryWriter(str(folder / "tensorboard")))  # type: ignore[no-untyped-call]  # torch's

    def watch(metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if name != "step":
                writer.add_scalar(name, value, metrics["step"])

    return watch


def _wandb(config: Config, folder: Path, stack: ExitStack) -> Watch:
    try:
        import wandb
    except ImportError:
        raise ConfigError("log.wandb needs the package wandb: pip install wandb") from None
    run = wandb.init(project="lora-fusion", name=folder.name, dir=str(folder), config=to_json(config), resume="allow")
    stack.callback(run.finish)
    return lambda metrics: run.log(dict(metrics), step=int(metrics["step"]))
