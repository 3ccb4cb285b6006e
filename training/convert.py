"""Between formats: a run's checkpoint to a PEFT adapter, an adapter merged into its base, a full FSDP checkpoint to a
Hugging Face folder. Everything is written beside its place and renamed.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import adapters
from training.config import ConfigError, restore
from training.loop.checkpoints import read_tensors
from training.loop.model import adapter_config, find_base, load_tokenizer

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def check_place(out: Path, *, replace: bool = False) -> None:
    """ConfigError when `out` holds something, unless it is an adapter, and nothing else, that may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not replace:
        raise ConfigError(f"{str(out)!r} exists already: choose another place or remove it first")
    held = {one.name for one in out.iterdir()} if out.is_dir() else set()
    if CONFIG not in held or held - {WEIGHTS, CONFIG, CARD}:
        what = sorted(held - {WEIGHTS, CONFIG, CARD}) or ["no adapter"]
        raise ConfigError(f"{str(out)!r} holds {what[0]!r}: only an adapter's own folder is replaced, choose another")


@contextmanager
def landing(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder beside `out` that takes its place when all went well; ConfigError when `out` holds something,
    unless it may be replaced.
    """
    check_place(out, replace=replace)
    out.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield place
        place.chmod(0o755)
        for file in place.iterdir():
            file.chmod(0o644)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            out.rename(old / out.name)
            try:
                place.rename(out)
            except OSError:
                (old / out.name).rename(out)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            place.rename(out)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def checkpoint_of(run: Path, step: int | None = None) -> Path:
    """A checkpoint of a run, the last if no step is given; ConfigError that says which there are."""
    known = sorted((run / "checkpoints").glob("step-????????"))
    if not known:
        raise ConfigError(f"{str(run)!r} holds no run with a checkpoint")
    if step is None:
        return known[-1]
    wanted = run / "checkpoints" / f"step-{step:08d}"
    if wanted not in known:
        raise ConfigError(
            f"no checkpoint of step {step}: there are {', '.join(str(int(one.name[5:])) for one in known)}"
        )
    return wanted


def export(run: Path, out: Path, *, step: int | None = None, replace: bool = False, card: str = "") -> Path:
    """A checkpoint of a run as a PEFT adapter folder, read again and checked as the server will."""
    source = checkpoint_of(run, step)
    config = restore(json.loads((run / "config.json").read_text()))
    tensors = read_tensors(source, "adapter.")
    dtype = getattr(torch, config.lora.dtype)
    with landing(out, replace=replace) as place:
        content = adapter_config(config, tensors, config.model.base)
        (place / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        ordered = {name: tensors[name].to(dtype).contiguous() for name in sorted(tensors)}
        save_file(ordered, place / WEIGHTS, metadata={"format": "pt"})
        if card:
            (place / CARD).write_text(card, encoding="utf-8")
        adapters.load(place)
    return out


def merge(adapter: Path, out: Path, *, base: str | None = None, weight: float = 1.0) -> Path:
    """base + weight·ΔW as a Hugging Face folder, in the base's dtype; the product is taken in float32."""
    from transformers import AutoModelForCausalLM

    loaded = adapters.load(adapter)
    folder = find_base(base or loaded.base or "")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    modules = dict(model.named_modules())
    if unknown := [name for name in loaded.modules if name not in modules]:
        raise ConfigError(f"the adapter has {unknown[0]!r}, which {folder!r} has not: it is of another base")
    tied = Counter(id(one) for _, one in model.named_parameters(remove_duplicate=False))
    for name in loaded.modules:
        parameter = modules[name].weight
        if tied[id(parameter)] > 1:
            raise ConfigError(
                f"the adapter changes {name!r}, whose weight the base uses elsewhere, too: merged it would change both"
            )
        parameter.data = (parameter.data.float() + weight * loaded.delta(name)).to(parameter.dtype)
    _save_model(model, folder, out)
    return out


def from_fsdp(checkpoint: Path, base: str, out: Path) -> Path:
    """A sharded checkpoint of a whole model (a folder of .distcp files) as a Hugging Face folder; `base` gives
    configuration and tokenizer. ConfigError when its parameters are not those of that model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (checkpoint / ".metadata").is_file():
        raise ConfigError(f"{str(checkpoint)!r} is no sharded checkpoint: it has no .metadata")
    folder = find_base(base)
    found = {_WRAPPERS.sub("", name): value for name, value in read_tensors(checkpoint).items()}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    expected = set(model.state_dict())
    tied = {name for name, value in model.named_parameters(remove_duplicate=False)} - {
        n for n, _ in model.named_parameters()
    }
    for prefix in ("", "model.", "module.", "state_dict.", "model_state."):
        weights = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        if expected - tied <= set(weights):
            break
    else:
        lacking = sorted(expected - tied - {name.removeprefix("model.") for name in found} - set(found))
        raise ConfigError(
            f"the checkpoint is of another model than {folder!r}: it has no {(lacking or ['weights'])[0]!r}"
        )
    wrong = [name for name in expected & set(weights) if weights[name].shape != model.state_dict()[name].shape]
    if wrong:
        raise ConfigError(f"{wrong[0]!r} is {tuple(weights[wrong[0]].shape)} in the checkpoint: it is of another model")
    model.load_state_dict({name: weights[name] for name in expected & set(weights)}, strict=False, assign=True)
    model.tie_weights()
    _save_model(model, folder, out)
    return out


def _save_model(model: Any, base: str, out: Path) -> None:
    with landing(out) as place:
        model.save_pretrained(place)
        load_tokenizer(base).save_pretrained(place)
