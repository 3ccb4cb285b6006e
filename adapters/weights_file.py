"""The weights of an adapter on disk: adapter_model.safetensors, checked by its header, read module by module."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import ItemsView, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .adapter import LoraModule, ModuleFacts
from .config import LoraConfig, read_object
from .errors import AdapterError

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_HEADER_BYTES = 64 << 20

_TENSOR = re.compile(r"base_model\.model\.([\w.-]{1,256})\.lora_(A|B)\.weight", re.ASCII)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STRANGERS = (
    ("lora_magnitude_vector", "dora", "DoRA rescales the whole weight"),
    ("lora_embedding_", "embedding", "a LoRA on an embedding is not fused yet"),
    ("lora_B.bias", "lora_bias", "a bias is no low-rank update"),
    ("trainable_tokens", "trainable_tokens", "rows of the embedding are no low-rank update"),
)


class FileModules(Mapping[str, LoraModule]):
    """Modules of a safetensors file, sorted, each read when asked for; `facts` come from the header, which is
    checked at once. AdapterError for whatever is wrong.
    """

    def __init__(self, file: Path, size: int, config: LoraConfig) -> None:
        self.facts = _facts(_check_header(file, size), config)
        self._file = file
        self._config = config

    def __iter__(self) -> Iterator[str]:
        return iter(self.facts)

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, module: str) -> LoraModule:
        if module not in self.facts:
            raise KeyError(module)
        return next(self._read([module]))[1]

    def items(self) -> ItemsView[str, LoraModule]:
        """All modules, read in one go."""
        return dict(self._read(list(self.facts))).items()

    def _read(self, modules: Sequence[str]) -> Iterator[tuple[str, LoraModule]]:
        with _opened(self._file) as stream:
            for module in modules:
                a, b = (_finite(stream, f"{PREFIX}{module}.lora_{factor}.weight") for factor in "AB")
                yield module, LoraModule(a, b, self._config.scaling(module))


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as stream:
            yield stream
    except AdapterError:
        raise
    except Exception as error:  # the library has errors of many types; whatever it dislikes, the file is at fault
        raise AdapterError("not_safetensors", f"{WEIGHTS} cannot be read: {error}") from error


def _finite(stream: Any, name: str) -> Tensor:
    """A copy of one tensor, after a look at its numbers."""
    tensor: Tensor = stream.get_tensor(name).clone()
    if not torch.isfinite(tensor).all():
        raise AdapterError("nan", f"tensor {name!r} holds NaN or infinite values: the training diverged")
    return tensor


Header = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def _check_header(file: Path, size: int) -> Header:
    """Dtype and shape of every tensor, after checking the header by our own rules: whole, no repeated name,
    float dtypes, shapes that fill their bytes.
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
    found, end = {}, 0
    for name, entry in header.items():
        dtype, shape, stop = _entry(name, entry)
        found[name] = dtype, shape
        end = max(end, stop)
    if 8 + length + end > size:
        raise AdapterError("truncated", f"{WEIGHTS} has {size} bytes, its header speaks of {8 + length + end}")
    with _opened(file):  # the library's own rules: no gaps, no overlaps
        return found


def _entry(name: str, entry: object) -> tuple[torch.dtype, tuple[int, ...], int]:
    """(dtype, shape, end of its bytes) of one tensor of the header."""
    wrong = AdapterError("not_safetensors", f"{WEIGHTS} describes {name!r} as {str(entry)[:80]!r}")
    if not isinstance(entry, dict):
        raise wrong
    lists: list[list[int]] = []
    for numbers in (entry.get("shape"), entry.get("data_offsets")):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
            raise wrong
        lists.append(numbers)
    shape, offsets = lists
    if entry.get("dtype") not in _DTYPES:
        raise AdapterError("dtype", f"tensor {name!r} is {entry.get('dtype')!r}: expected one of {tuple(_DTYPES)}")
    dtype = _DTYPES[entry["dtype"]]
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise wrong
    return dtype, tuple(shape), offsets[1]


def _facts(header: Header, config: LoraConfig) -> dict[str, ModuleFacts]:
    """Modules by name, sorted, after checking that each has an A and a B of the rank that the config says."""
    factors: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
    for name, described in header.items():
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise _stranger(name)
        factors.setdefault(found[1], {})[found[2]] = described
    if not factors:
        raise AdapterError("missing_weights", "the adapter has no LoRA module: expected at least one")
    return {module: _fact(module, factors[module], config) for module in sorted(factors)}


def _fact(name: str, pair: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], config: LoraConfig) -> ModuleFacts:
    if len(pair) != 2:
        have, lack = ("A", "B") if "A" in pair else ("B", "A")
        raise AdapterError("missing_weights", f"module {name!r} has lora_{have} but no lora_{lack}")
    (dtype_a, a), (dtype_b, b), rank = pair["A"], pair["B"], config.rank(name)
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank or 0 in (*a, *b):
        raise AdapterError(
            "shape",
            f"module {name!r} has A {a} and B {b}: the config says rank {rank}, "
            f"so ({rank}, d_in) and (d_out, {rank}) were expected",
        )
    nbytes = math.prod(a) * dtype_a.itemsize + math.prod(b) * dtype_b.itemsize
    return ModuleFacts(rank, (b[0], a[1]), torch.promote_types(dtype_a, dtype_b), nbytes)


def _stranger(name: str) -> AdapterError:
    for part, reason, why in _STRANGERS:
        if part in name:
            return AdapterError(reason, f"the adapter holds the tensor {name!r}: {why}")
    if "lora_" in name:
        return AdapterError("not_lora", f"tensor {name!r} is not named as PEFT names them: {PREFIX}….lora_A.weight")
    return AdapterError(
        "modules_to_save", f"the adapter holds {name!r}, a full copy of a base weight, which no LoRA has"
    )
