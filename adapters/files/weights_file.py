"""The weights of an adapter on disk: adapter_model.safetensors, checked by its header, read module by module."""

import json
import os
import re
from collections.abc import Callable, ItemsView, Iterator, Mapping
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from adapters.adapter import LoraAdapter, LoraModule, ModuleFacts, empty, is_finite
from adapters.errors import AdapterError, quote
from adapters.files.config import LoraConfig
from adapters.files.header import DTYPES, TensorEntry, read_header
from adapters.files.layout import WEIGHTS

PREFIX = "base_model.model."

_TENSOR_NAME = re.compile(r"base_model\.model\.([\w.-]{1,256})\.lora_(A|B)\.weight", re.ASCII)
_WRITE_ORDER = ("F64", "F32", "BF16", "F16")
"""The order in which safetensors writes dtypes."""
UNSUPPORTED_TENSORS = (
    ("lora_magnitude_vector", "dora", "DoRA rescales the whole weight"),
    ("lora_embedding_", "embedding", "a LoRA on an embedding is not fused yet"),
    ("lora_B.bias", "lora_bias", "a bias is not a low-rank update"),
    ("trainable_tokens", "trainable_tokens", "rows of the embedding are not a low-rank update"),
)


class FileModules(Mapping[str, LoraModule]):
    """Modules of a safetensors file, sorted by name, each read on access; `facts` come from the header, which is
    checked at once. AdapterError when the header or a module is not valid.
    """

    def __init__(self, file: Path, size: int, config: LoraConfig) -> None:
        self._entries = read_header(file, size)
        self.facts = _check_modules(self._entries, config)
        self._scalings = {module: config.scaling(module) for module in self.facts}
        self._file = file

    def __iter__(self) -> Iterator[str]:
        return iter(self.facts)

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, module: str) -> LoraModule:
        if module not in self.facts:
            raise KeyError(module)
        return self._read_module(module, lambda entry: self._read_bytes(entry.start, entry.stop))

    def items(self) -> ItemsView[str, LoraModule]:
        """All modules, read in one go; their numbers are checked in one go too, if they are of one dtype."""
        first = min(entry.start for entry in self._entries.values())
        data = self._read_bytes(first, max(entry.stop for entry in self._entries.values()))
        kinds = {entry.dtype for entry in self._entries.values()}
        finite = len(kinds) == 1 and is_finite(data.view(*kinds))

        def read(entry: TensorEntry) -> Tensor:
            return data[entry.start - first : entry.stop - first]

        return {name: self._read_module(name, read, finite) for name in self}.items()

    def _read_bytes(self, start: int, stop: int) -> Tensor:
        """A part of the file, uint8."""
        content = empty([stop - start], torch.uint8)
        left = content.numpy().data
        try:
            with FileIO(self._file) as stream:
                stream.seek(start)
                while left:
                    count = stream.readinto(left)
                    if not count:
                        raise AdapterError("truncated", f"{WEIGHTS} was shortened after its header was read")
                    left = left[count:]
        except OSError as error:
            raise AdapterError("not_safetensors", f"{WEIGHTS} cannot be read: {error.strerror}") from error
        return content

    def _read_module(self, module: str, read: Callable[[TensorEntry], Tensor], finite: bool = False) -> LoraModule:
        """The factors, their numbers checked unless they are known to be `finite`."""
        factors = []
        for letter in "AB":
            name = f"{PREFIX}{module}.lora_{letter}.weight"
            entry = self._entries[name]
            content = read(entry)
            aligned = content if content.storage_offset() % entry.dtype.itemsize == 0 else content.clone()
            factors.append(aligned.view(entry.dtype).view(entry.shape))
            if not (finite or is_finite(factors[-1])):
                raise AdapterError("nan", f"tensor {name!r} holds NaN or infinite values: the training diverged")
        a, b = factors
        return LoraModule(a, b, self._scalings[module])


def write_weights(adapter: LoraAdapter, file: Path) -> None:
    """The factors in safetensors format, byte for byte as its library writes them, but straight from memory into a
    file whose space is allocated first: faster, and a full disk is reported before anything is written.
    """
    tensors = {
        f"{PREFIX}{name}.lora_{letter}.weight": factor.detach().cpu().contiguous()
        for name, module in adapter.modules.items()
        for letter, factor in (("A", module.a), ("B", module.b))
    }
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    order = [(kind, name) for kind in _WRITE_ORDER for name in sorted(tensors) if tensors[name].dtype == DTYPES[kind]]
    end = 0
    for kind, name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as stream:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(stream.fileno(), 0, 8 + len(head) + end)
        stream.write(len(head).to_bytes(8, "little") + head)
        stream.writelines(tensors[name].reshape(-1).view(torch.uint8).numpy().data for _, name in order)


def _check_modules(entries: Mapping[str, TensorEntry], config: LoraConfig) -> dict[str, ModuleFacts]:
    """Facts by module name, sorted, after checking that each has an A and a B of the rank in the config."""
    factors: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise _reject_tensor(name)
        factors.setdefault(match[1], {})[match[2]] = entry
    if not factors:
        raise AdapterError("missing_weights", "the adapter has no LoRA module: expected at least one")
    return {module: _check_factors(module, factors[module], config) for module in sorted(factors)}


def _check_factors(name: str, pair: Mapping[str, TensorEntry], config: LoraConfig) -> ModuleFacts:
    if len(pair) != 2:
        have, lack = ("A", "B") if "A" in pair else ("B", "A")
        raise AdapterError("missing_weights", f"module {name!r} has lora_{have} but no lora_{lack}")
    a, b, rank = pair["A"].shape, pair["B"].shape, config.ranks.find(name)
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank or 0 in (*a, *b):
        raise AdapterError(
            "shape",
            f"module {name!r} has A {a} and B {b}: the config says rank {rank}, "
            f"so ({rank}, d_in) and (d_out, {rank}) were expected",
        )
    nbytes = sum(entry.stop - entry.start for entry in pair.values())
    return ModuleFacts(rank, (b[0], a[1]), torch.promote_types(pair["A"].dtype, pair["B"].dtype), nbytes)


def _reject_tensor(name: str) -> AdapterError:
    for part, reason, why in UNSUPPORTED_TENSORS:
        if part in name:
            return AdapterError(reason, f"the adapter holds the tensor {quote(name)}: {why}")
    if "lora_" in name:
        return AdapterError(
            "not_lora", f"tensor {quote(name)} does not have a PEFT name: expected {PREFIX}….lora_A.weight"
        )
    return AdapterError(
        "modules_to_save", f"the adapter holds {quote(name)}, a full copy of a base weight, which is not LoRA"
    )
