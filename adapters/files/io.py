"""Adapters on disk: standard PEFT folders, adapter_config.json + adapter_model.safetensors. Never pickle."""

import os
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from adapters.adapter import LoraAdapter, LoraModule, make_adapter
from adapters.errors import AdapterError, quote
from adapters.files.config import PeftDetails, read_config, write_config
from adapters.files.experts import join_experts, split_experts
from adapters.files.json_text import to_json
from adapters.files.landing import atomic_folder
from adapters.files.layout import CONFIG, PROVENANCE, WEIGHTS, reject_config, reject_weights
from adapters.files.one_rank import to_one_rank
from adapters.files.weights_file import FileModules, write_weights
from adapters.readout import MAX_GATE_BYTES

MAX_CONFIG_BYTES = 4 << 20


def load(path: str | os.PathLike[str], *, max_bytes: int | None = None, lazy: bool = False) -> LoraAdapter:
    """Read a PEFT folder and check all of it; the tensors are copies, independent of the files.

    Ranks and scalings follow r, lora_alpha, use_rslora, rank_pattern and alpha_pattern as PEFT reads them.
    AdapterError, with a reason code, for whatever cannot be fused as LoRA, or a weights file over `max_bytes`; of a
    gate, over MAX_GATE_BYTES. With `lazy` only the header is read now; each module is read, and its numbers checked, on
    every access, and not kept: for adapters larger than the memory they may take.
    """
    folder = Path(path)
    config = read_config(_read_config_file(folder))
    weights = folder / WEIGHTS
    if not weights.exists():
        raise reject_weights(quote(folder.name), (path.name for path in folder.iterdir()))
    size = _file_size(weights)
    if max_bytes is not None and size > max_bytes:
        raise AdapterError("too_large", f"{WEIGHTS} has {size} bytes: expected at most {max_bytes}")
    if config.gate is not None and size > MAX_GATE_BYTES:
        raise AdapterError("gate", f"{WEIGHTS} of the gate has {size} bytes: expected at most {MAX_GATE_BYTES}")
    modules = FileModules(weights, size, config)
    read: Mapping[str, LoraModule] = modules
    if not lazy or modules.parameters:
        split = split_experts(dict(modules.items()), modules.parameters, modules.ranks)
        read = make_adapter(split, config.base).modules
    notes = (*config.notes, *modules.notes)
    stated = config.gate, config.answer_only, config.weight_range
    return LoraAdapter(read, config.base, notes, modules.copies, *stated)


def save(
    adapter: LoraAdapter,
    path: str | os.PathLike[str],
    *,
    provenance: Mapping[str, object] | None = None,
    details: PeftDetails | None = None,
    one_rank: bool = False,
) -> None:
    """Write a folder that PEFT and vLLM open, whole or not at all (see `atomic_folder`); the same adapter gives the
    same bytes anywhere.

    `provenance` (JSON values) goes to fusion.json, since PEFT warns about unknown keys in its own file; of these it
    has `answer_only` alone, for adapters that PEFT would let act on the prompt, too. `details` say in
    adapter_config.json how the adapter was trained. Scalings come back to the last bit when they are alpha/r
    or alpha/sqrt(r). With `one_rank` the update is written at one rank and alpha for all modules, for readers that
    know no patterns (see `to_one_rank`). FileExistsError when `path` exists (an empty folder is taken over).
    """
    if one_rank:
        adapter = to_one_rank(adapter)
    with atomic_folder(path) as folder:
        tensors, described = join_experts(adapter.modules)
        parameters = described.keys() - tensors.keys()
        (folder / CONFIG).write_bytes(write_config(replace(adapter, modules=described), details, parameters))
        write_weights(replace(adapter, modules=tensors), folder / WEIGHTS)
        if provenance is not None:
            (folder / PROVENANCE).write_bytes(to_json(provenance))


def _read_config_file(folder: Path) -> bytes:
    if not folder.is_dir():
        raise AdapterError("missing_config", f"{folder.name!r} is not a folder: expected a PEFT adapter folder")
    file = folder / CONFIG
    if not file.exists():
        raise reject_config(folder)
    if _file_size(file) > MAX_CONFIG_BYTES:
        raise AdapterError("bad_config", f"{CONFIG} is too large: expected at most {MAX_CONFIG_BYTES} bytes")
    return file.read_bytes()


def _file_size(file: Path) -> int:
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        reason = "not_safetensors" if file.name == WEIGHTS else "bad_config"
        raise AdapterError(reason, f"{file.name!r} is not a regular file: expected a plain file")
    return status.st_size
