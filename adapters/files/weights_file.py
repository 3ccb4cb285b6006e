"""The weights of an adapter on disk: adapter_model.safetensors, checked by its header, read module by module."""

import json
import math
import os
from collections.abc import Callable, ItemsView, Iterator, Mapping
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from adapters.adapter import LoraAdapter, LoraModule, ModuleFacts, empty, is_finite
from adapters.errors import AdapterError, quote
from adapters.files.config import LoraConfig
from adapters.files.experts import name_parameters
from adapters.files.header import DTYPES, WIDER, TensorEntry, read_header
from adapters.files.layout import WEIGHTS
from adapters.files.tensor_names import Factors, sort_tensors, tensor_name

_WRITE_ORDER = ("F64", "F32", "BF16", "F16")
"""The order in which safetensors writes dtypes."""


class FileModules(Mapping[str, LoraModule]):
    """Modules of a safetensors file, sorted by name, each read on access; `facts` come from the header, which is
    checked at once. AdapterError when the header or a module is not valid.
    """

    def __init__(self, file: Path, size: int, config: LoraConfig) -> None:
        self._entries = read_header(file, size)
        names = sort_tensors(self._entries, config.bias)
        if not names.factors:
            raise AdapterError("missing_weights", "the adapter has no LoRA module: expected at least one")
        self._names = names.factors
        self.parameters = name_parameters(names.factors, config.parameters)
        """The parameters' names of experts that are one pair of factors, by module; see `experts`."""
        for module, parameter in self.parameters.items():
            names.factors[module].name = parameter  # which patterns mean
        self.ranks = {module: config.ranks.find(names.factors[module].name) for module in self.parameters}
        self.facts = {
            module: _check_factors(module, factors, self._entries, config, module in self.parameters)
            for module, factors in names.factors.items()
        }
        self._scalings = {module: config.scaling(factors.name) for module, factors in names.factors.items()}
        self.copies = {weight: self._entries[tensor].shape for tensor, weight in names.copies.items()}
        modules = {module: factors for module, factors in names.factors.items() if module not in self.parameters}
        self.notes = (*names.notes, *_note_strays(modules, config))
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
        entries = [self._entries[tensor] for factors in self._names.values() for tensor in factors.tensors.values()]
        first, end = min(entry.start for entry in entries), max(entry.stop for entry in entries)
        if end - first > sum(entry.stop - entry.start for entry in entries):  # a copy lies between them
            return dict(zip(self, map(self.__getitem__, self), strict=True)).items()
        data = self._read_bytes(first, end)
        kinds = {entry.dtype for entry in entries}
        finite = len(kinds) == 1 and kinds.isdisjoint(WIDER) and is_finite(data.view(*kinds))

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
            name = self._names[module].tensors[letter]
            entry = self._entries[name]
            content = read(entry)
            aligned = content if content.storage_offset() % entry.dtype.itemsize == 0 else content.clone()
            factor = aligned.view(entry.dtype).view(entry.shape)
            factors.append(factor.to(WIDER[entry.dtype]) if entry.dtype in WIDER else factor)
            if not (finite or is_finite(factors[-1])):
                raise AdapterError("nan", f"tensor {name!r} holds NaN or infinite values: the training diverged")
        a, b = factors
        return LoraModule(a, b, self._scalings[module], self._names[module].is_embedding)


def write_weights(adapter: LoraAdapter, file: Path) -> None:
    """The factors in safetensors format, byte for byte as its library writes them, but straight from memory into a
    file whose space is allocated first: faster, and a full disk is reported before anything is written.
    """
    tensors = {
        tensor_name(name, letter, is_embedding=module.is_embedding): factor.detach().cpu().contiguous()
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


def _check_factors(
    name: str, factors: Factors, entries: Mapping[str, TensorEntry], config: LoraConfig, is_parameter: bool
) -> ModuleFacts:
    """The facts of a module, after checking that it has an A and a B of the rank in the config."""
    pair = {letter: entries[tensor] for letter, tensor in factors.tensors.items()}
    if len(pair) != 2:
        have, lack = ("A", "B") if "A" in pair else ("B", "A")
        raise AdapterError("missing_weights", f"module {name!r} has lora_{have} but no lora_{lack}")
    a, b, rank = pair["A"].shape, pair["B"].shape, config.ranks.find(factors.name)
    if is_parameter and a and a[0] % rank == 0:
        rank = a[0]
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank or 0 in (*a, *b):
        raise AdapterError(
            "shape",
            f"module {name!r} has A {a} and B {b}: the config says rank {rank}, "
            f"so ({rank}, d_in) and (d_out, {rank}) were expected{_explain_empty(a, b)}",
        )
    kinds = [WIDER.get(entry.dtype, entry.dtype) for entry in pair.values()]
    nbytes = sum(math.prod(entry.shape) * kind.itemsize for entry, kind in zip(pair.values(), kinds, strict=True))
    return ModuleFacts(rank, (b[0], a[1]), torch.promote_types(*kinds), nbytes, factors.is_embedding)


def _explain_empty(a: tuple[int, ...], b: tuple[int, ...]) -> str:
    if min(len(a), len(b)) >= 2 and 0 not in (*a, *b):
        return "" if len(a) == len(b) == 2 else "; LoRA on convolutions is not supported"
    return "; it was saved before its shards were gathered (ZeRO-3, FSDP): save it again with all of them"


def _note_strays(modules: Mapping[str, Factors], config: LoraConfig) -> list[str]:
    """A note on the modules that the config does not name."""
    strays = [module for module, factors in modules.items() if not config.targets.include(factors.name)]
    if not strays:
        return []
    return [
        f"{len(strays)} modules are outside target_modules, such as {quote(strays[0])}: they are applied, as vLLM "
        "does; PEFT leaves them out"
    ]
