"""The files that an adapter's weights are in: one, or the parts that transformers and others split it into."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from adapters.convert.pickles import convert_pickle
from adapters.errors import AdapterError, quote
from adapters.files.layout import PICKLES, WEIGHTS, reject_weights

SINGLE = (WEIGHTS, *PICKLES)
"""Names of one file with all weights, the first preferred."""
PART = re.compile(r"adapter_model-(\d{5})-of-(\d{5})\.(safetensors|bin)", re.ASCII)
INDEX = re.compile(r"adapter_model\.(safetensors|bin)\.index\.json", re.ASCII)
MAX_PARTS, MAX_INDEX_BYTES = 1000, 16 << 20


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights of an adapter, or says where they are."""
    return name in SINGLE or PART.fullmatch(name) is not None or INDEX.fullmatch(name) is not None


def find_weights(folder: Path, only: str = "") -> tuple[list[Path], tuple[str, ...]]:
    """The file of all weights in `folder`, or all its parts, and notes; `only`, if given, is the file that was asked
    for. AdapterError 'missing_weights' when there is none, or a part is missing.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    single = next((name for name in SINGLE if name in names), None)
    chosen = only if only in SINGLE else "" if only else single
    parts = [name for name in names if PART.fullmatch(name)]
    if chosen:
        note = f"read {chosen}, and not the {len(parts)} parts of an adapter beside it"
        return [folder / chosen], (note,) * bool(parts)
    kind = _find_kind(only) if only else next((_find_kind(name) for name in reversed(parts)), "")
    parts = [name for name in parts if _find_kind(name) == kind]
    if not parts:
        raise reject_weights(quote(folder.name), names)
    return [folder / name for name in _check_parts(parts, kind)], ()


def read_weights(files: Iterable[Path], scratch: Path) -> dict[str, Tensor]:
    """The tensors of all files by name; a pickle is read by `pickles`, by way of `scratch`. AdapterError
    'not_safetensors' for a damaged file, and for parts that do not make one adapter.
    """
    tensors: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    files = list(files)
    for file in files:
        for name, tensor in _read_file(file, scratch).items():
            if name in tensors:
                raise AdapterError(
                    "not_safetensors",
                    f"{quote(owners[name])} and {quote(file.name)} both hold the tensor {quote(name)}",
                )
            tensors[name], owners[name] = tensor, file.name
    if len(files) > 1 and (index := _find_index(files[0])).is_file():
        _check_index(index, owners)
    return tensors


def _read_file(file: Path, scratch: Path) -> dict[str, Tensor]:
    if file.suffix != ".safetensors":
        converted = scratch / f"{file.stem}.converted"
        convert_pickle(file, converted)
        file = converted
    try:
        return load_file(file)
    except Exception as error:  # the library raises many types; whatever it rejects, the file is at fault
        raise AdapterError("not_safetensors", f"{quote(file.name)} cannot be read: {error}") from error


def _find_kind(name: str) -> str:
    match = PART.fullmatch(name)
    if match is not None:
        return match[3]
    match = INDEX.fullmatch(name)
    return match[1] if match else ""


def _check_parts(parts: list[str], kind: str) -> list[str]:
    """The names of all parts; AdapterError unless they are those of one adapter, from the first to the last."""
    totals = {int(name[23:28]) for name in parts}
    (count, *others) = sorted(totals)
    if others or count > MAX_PARTS:
        sizes = " and of ".join(str(total) for total in sorted(totals)[:3])
        raise AdapterError("missing_weights", f"there are parts of {sizes}: expected those of one adapter")
    wanted = [f"adapter_model-{number:05}-of-{count:05}.{kind}" for number in range(1, count + 1)]
    missing = [name for name in wanted if name not in parts]
    if missing or len(parts) != count:
        named = quote(missing[0]) if missing else "of one adapter"
        raise AdapterError("missing_weights", f"part {named} is missing, of {count}: expected all parts in one folder")
    return wanted


def _find_index(part: Path) -> Path:
    return part.with_name(f"adapter_model{part.suffix}.index.json")


def _check_index(index: Path, owners: dict[str, str]) -> None:
    """AdapterError unless the index has every tensor where it was found, and no other."""
    try:
        content = json.loads(index.read_bytes()) if index.stat().st_size <= MAX_INDEX_BYTES else None
    except (ValueError, RecursionError) as error:
        raise AdapterError("not_safetensors", f"{index.name} cannot be read as JSON: {error}") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict):
        raise AdapterError("not_safetensors", f"{index.name} has no weight_map of names to files")
    if places != owners:
        odd = next(name for name in (*places, *owners) if places.get(name) != owners.get(name))
        raise AdapterError(
            "not_safetensors",
            f"{index.name} says that {quote(odd)} is in {quote(places.get(odd))}, but it is in "
            f"{quote(owners.get(odd))}: the parts are not those of one adapter",
        )
