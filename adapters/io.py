"""Adapters on disk: standard PEFT folders, adapter_config.json + adapter_model.safetensors. Never pickle."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from .adapter import LoraAdapter, LoraModule, make_adapter
from .config import LoraConfig, read_config, read_object, to_json, write_config
from .errors import AdapterError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PROVENANCE = "fusion.json"
PREFIX = "base_model.model."
MAX_CONFIG_BYTES = 4 << 20
MAX_HEADER_BYTES = 64 << 20

_TENSOR = re.compile(r"base_model\.model\.([\w.-]{1,256})\.lora_(A|B)\.weight", re.ASCII)
_DTYPES = ("F64", "F32", "F16", "BF16")
_STRANGERS = (
    ("lora_magnitude_vector", "dora", "DoRA rescales the whole weight"),
    ("lora_embedding_", "embedding", "a LoRA on an embedding is not fused yet"),
    ("lora_B.bias", "lora_bias", "a bias is no low-rank update"),
    ("trainable_tokens", "trainable_tokens", "rows of the embedding are no low-rank update"),
)


def load(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> LoraAdapter:
    """Read a PEFT folder and check all of it; the tensors are copies, independent of the files.

    Ranks and scalings follow r, lora_alpha, use_rslora, rank_pattern and alpha_pattern as PEFT reads them.
    AdapterError, with a reason code, for whatever cannot be fused as LoRA; `max_bytes` bounds the
    weights' file.
    """
    folder = Path(path)
    config = read_config(_read_config_file(folder))
    weights = folder / WEIGHTS
    if not weights.exists():
        if any(folder.glob("adapter_model*.bin")):
            raise AdapterError(
                "pickle_only",
                f"{folder.name!r} has its weights in a pickle only, which can run code: save it as {WEIGHTS}",
            )
        raise AdapterError("missing_weights", f"{folder.name!r} has no {WEIGHTS}: expected a PEFT adapter folder")
    size = _regular_size(weights)
    if max_bytes is not None and size > max_bytes:
        raise AdapterError("too_large", f"{WEIGHTS} has {size} bytes: expected at most {max_bytes}")
    names = _check_header(weights, size)
    return make_adapter(_modules(_read_tensors(weights, names), config), config.base)


def save(adapter: LoraAdapter, path: str | os.PathLike[str], *, provenance: Mapping[str, object] | None = None) -> None:
    """Write a PEFT folder that PEFT and vLLM open; the same adapter gives the same bytes anywhere.

    Written beside `path`, synced, then renamed, so it is there whole or not at all. FileExistsError
    if `path` exists (an empty folder is taken over). `provenance` (JSON values) goes to
    fusion.json, since PEFT warns about unknown keys in its own file. Scalings come back to the last
    bit when they are alpha/r or alpha/sqrt(r).
    """
    target = Path(os.path.abspath(path))
    if os.path.lexists(target) and not _is_empty_folder(target):
        raise FileExistsError(f"{os.fspath(path)!r} exists already: choose another place or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".saving-{os.getpid()}-{secrets.token_hex(8)}"
    scratch.mkdir()
    try:
        _write(scratch / CONFIG, write_config(adapter))
        _write(scratch / WEIGHTS, to_safetensors(_tensors(adapter), metadata={"format": "pt"}))
        if provenance is not None:
            _write(scratch / PROVENANCE, to_json(provenance))
        _sync_folder(scratch)
        scratch.rename(target)
        _sync_folder(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _read_config_file(folder: Path) -> bytes:
    if not folder.is_dir():
        raise AdapterError("missing_config", f"{folder.name!r} is not a folder: expected a PEFT adapter folder")
    file = folder / CONFIG
    if not file.exists():
        raise AdapterError("missing_config", f"{folder.name!r} has no {CONFIG}: expected a PEFT adapter folder")
    if _regular_size(file) > MAX_CONFIG_BYTES:
        raise AdapterError("bad_config", f"{CONFIG} is over {MAX_CONFIG_BYTES} bytes: that is no adapter's config")
    return file.read_bytes()


def _regular_size(file: Path) -> int:
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise AdapterError("not_safetensors" if file.name == WEIGHTS else "bad_config", f"{file.name} is no plain file")
    return found.st_size


def _check_header(file: Path, size: int) -> list[str]:
    """The tensors' names, after checking the header by our own rules: whole, no repeated name,
    float dtypes.
    """
    with file.open("rb") as stream:
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or (8 + length > size and length <= MAX_HEADER_BYTES):
            raise AdapterError("truncated", f"{WEIGHTS} has {size} bytes and ends inside its header: copy it again")
        if length > MAX_HEADER_BYTES:
            raise AdapterError("not_safetensors", f"{WEIGHTS} is not in safetensors format: its header is not one")
        header = read_object(stream.read(length), f"the header of {WEIGHTS}", "not_safetensors")
    header.pop("__metadata__", None)
    end = 0
    for name, entry in header.items():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(offsets, list) or not all(type(n) is int for n in offsets):
            raise AdapterError("not_safetensors", f"{WEIGHTS} describes {name!r} as {str(entry)[:80]!r}")
        if entry.get("dtype") not in _DTYPES:
            raise AdapterError("dtype", f"tensor {name!r} is {entry.get('dtype')!r}: expected one of {_DTYPES}")
        end = max([end, *offsets])
    if 8 + length + end > size:
        raise AdapterError("truncated", f"{WEIGHTS} has {size} bytes, its header speaks of {8 + length + end}")
    return list(header)


def _read_tensors(file: Path, names: list[str]) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as stream:
            return {name: stream.get_tensor(name).clone() for name in names}
    except Exception as error:  # the library has errors of many types; whatever it dislikes, the file is at fault
        raise AdapterError("not_safetensors", f"{WEIGHTS} cannot be read: {error}") from error


def _modules(tensors: Mapping[str, Tensor], config: LoraConfig) -> dict[str, LoraModule]:
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise _stranger(name)
        if not torch.isfinite(tensor).all():
            raise AdapterError("nan", f"tensor {name!r} holds NaN or infinite values: the training diverged")
        factors.setdefault(found[1], {})[found[2]] = tensor
    return {module: _module(module, pair, config) for module, pair in factors.items()}


def _module(name: str, pair: Mapping[str, Tensor], config: LoraConfig) -> LoraModule:
    if len(pair) != 2:
        have, lack = ("A", "B") if "A" in pair else ("B", "A")
        raise AdapterError("missing_weights", f"module {name!r} has lora_{have} but no lora_{lack}")
    a, b, rank = pair["A"], pair["B"], config.rank(name)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterError(
            "shape",
            f"module {name!r} has A {tuple(a.shape)} and B {tuple(b.shape)}: the config says rank {rank}, "
            f"so ({rank}, d_in) and (d_out, {rank}) were expected",
        )
    return LoraModule(a, b, config.scaling(name))


def _stranger(name: str) -> AdapterError:
    for part, reason, why in _STRANGERS:
        if part in name:
            return AdapterError(reason, f"the adapter holds the tensor {name!r}: {why}")
    if "lora_" in name:
        return AdapterError("not_lora", f"tensor {name!r} is not named as PEFT names them: {PREFIX}….lora_A.weight")
    return AdapterError(
        "modules_to_save", f"the adapter holds {name!r}, a full copy of a base weight, which no LoRA has"
    )


def _tensors(adapter: LoraAdapter) -> dict[str, Tensor]:
    found = {}
    for name, module in sorted(adapter.modules.items()):
        found[f"{PREFIX}{name}.lora_A.weight"] = module.a.detach().cpu().contiguous().clone()
        found[f"{PREFIX}{name}.lora_B.weight"] = module.b.detach().cpu().contiguous().clone()
    return found


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
