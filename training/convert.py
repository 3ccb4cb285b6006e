"""Between formats: a run's checkpoint to a PEFT adapter, an adapter merged into its base, a full FSDP checkpoint to a
Hugging Face folder. Every folder appears whole or not at all.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adapters
from adapters.files import atomic_folder
from training.base_model import load_tokenizer, name_base, resolve_base
from training.config import Config, from_json
from training.errors import ConfigError
from training.loop.checkpoints import read_tensors

WEIGHTS, CONFIG, CARD, GATE = "adapter_model.safetensors", "adapter_config.json", "README.md", "gate.json"
OWN = {WEIGHTS, CONFIG, CARD, GATE}
"""The files of an adapter's folder that training writes."""
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIXES = ("", "model.", "module.", "state_dict.", "model_state.")
"""What trainers put before the names of a model's parameters."""


def check_place(out: Path, *, replace: bool = False) -> None:
    """ConfigError unless `out` is free or empty; with `replace` it may hold an adapter, and nothing else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not replace:
        raise ConfigError(f"{str(out)!r} already exists: choose another place or remove it first")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if CONFIG not in names or names - OWN:
        other = sorted(names - OWN)
        what = f"contains {other[0]!r}" if other else "is not an adapter"
        raise ConfigError(f"{str(out)!r} {what}: only a folder with an adapter alone is replaced, choose another place")


def find_checkpoint(run: Path, step: int | None = None) -> Path:
    """A checkpoint of a run, by default the last; ConfigError that lists the steps there are."""
    known = {int(path.name[5:]): path for path in sorted((run / "checkpoints").glob("step-????????"))}
    if not known:
        raise ConfigError(f"{str(run)!r} is not a run with a checkpoint: expected a folder with checkpoints/step-…")
    if step is None:
        return known[max(known)]
    if step not in known:
        raise ConfigError(f"there is no checkpoint of step {step}: expected one of {', '.join(map(str, known))}")
    return known[step]


def export(run: Path, out: Path, *, step: int | None = None, replace: bool = False, card: str = "") -> Path:
    """A checkpoint of a run as a PEFT adapter folder, read again and checked as the server will. `card` is its
    README.md.
    """
    checkpoint = find_checkpoint(run, step)
    config = from_json(json.loads((run / "config.json").read_text()))
    adapter = _make_adapter(read_tensors(checkpoint, "adapter."), config)
    check_place(out, replace=replace)
    details: adapters.PeftDetails = {
        "use_rslora": config.lora.rslora,
        "lora_dropout": config.lora.dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in adapter.modules}),
    }
    with atomic_folder(out, replace=replace) as folder:
        adapters.save(adapter, folder, details=details)
        if card:
            (folder / CARD).write_text(card, encoding="utf-8")
        adapters.load(folder)
    return out


def _make_adapter(tensors: Mapping[str, Tensor], config: Config) -> adapters.LoraAdapter:
    lora = config.lora
    dtype = getattr(torch, lora.dtype)
    scaling = lora.alpha / (math.sqrt(lora.r) if lora.rslora else lora.r)
    modules = {}
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix("lora_A.weight")
            a, b = (tensors[f"{stem}lora_{factor}.weight"].to(dtype).contiguous() for factor in "AB")
            modules[stem.removeprefix("base_model.model.").removesuffix(".")] = adapters.LoraModule(a, b, scaling)
    adapter = adapters.make_adapter(modules, name_base(config.model.base), answer_only=lora.answer_only)
    low, high = config.train.weight_range
    return adapter if (low, high) == (1, 1) else replace(adapter, weight_range=(float(low), float(high)))


def merge(adapter: Path, out: Path, *, base: str | None = None, weight: float = 1.0) -> Path:
    """base + weight·ΔW as a Hugging Face folder, in the base's dtype; the product is computed in float32. ConfigError
    when no one model is that.
    """
    from transformers import AutoModelForCausalLM

    loaded = adapters.load(adapter)
    if loaded.answer_only:
        raise ConfigError(
            f"{str(adapter)!r} acts on the answer alone, so no merged model is base and adapter: serve it as it is"
        )
    folder = resolve_base(base or loaded.base or "")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    modules = dict(model.named_modules())
    if unknown := [name for name in loaded.modules if name not in modules]:
        raise ConfigError(f"the adapter needs another --base: {folder!r} has no module {unknown[0]!r}")
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name in loaded.modules:
        parameter = modules[name].weight
        if uses[id(parameter)] > 1:
            raise ConfigError(
                f"the adapter changes {name!r}, whose weight the base uses twice: merging would change both uses"
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
        raise ConfigError(f"{str(checkpoint)!r} is not a sharded checkpoint: expected .distcp files and .metadata")
    folder = resolve_base(base)
    tensors = {_WRAPPERS.sub("", name): value for name, value in read_tensors(checkpoint).items()}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    expected = model.state_dict()
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    required = expected.keys() - (tied - {name for name, _ in model.named_parameters()})
    for prefix in _PREFIXES:
        weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if required <= weights.keys():
            break
    else:
        missing = sorted(required - {name.removeprefix("model.") for name in tensors} - tensors.keys())
        name = (missing or ["weights"])[0]
        raise ConfigError(f"the checkpoint is of another model than {folder!r}: it has no {name!r}")
    weights = {name: weights[name] for name in expected.keys() & weights.keys()}
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            shapes = f"{tuple(value.shape)} in the checkpoint and {tuple(expected[name].shape)} in {folder!r}"
            raise ConfigError(f"the checkpoint is of another model: {name!r} is {shapes}")
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    _save_model(model, folder, out)
    return out


def _save_model(model: Any, base: str, out: Path) -> None:
    check_place(out)
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        load_tokenizer(base).save_pretrained(folder)
