"""The header of a safetensors file: what it says of each tensor, checked before anything is made of it.

The header is JSON, but is read one tensor at a time, so that no header keeps the interpreter's lock for long, and
reading ends at the first fault.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import safe_open

from adapters.errors import MAX_QUOTED, AdapterError, clip, quote
from adapters.files.json_text import LFS_POINTER, reject_repeats
from adapters.files.layout import WEIGHTS

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
WIDER = {torch.float8_e4m3fn: torch.bfloat16, torch.float8_e5m2: torch.bfloat16}
"""What is computed in none: the dtype that holds all its numbers, which stands for it in memory."""
MAX_HEADER_BYTES, MAX_TENSORS = 10 << 20, 2**16
"""Larger than the header of any adapter that this project knows of: 10,000 tensors need 1.5 MB."""
MAX_METADATA_CHARS, MAX_ENTRY_CHARS, MAX_DIMS = 2**20, 1024, 8

METADATA = "__metadata__"

# JSON of the form that a header has. Possessive repeats (`*+`) never go back, so each pattern takes linear time.
_ = r"[ \t\n\r]*+"
_START = re.compile(rf"{_}\{{")
_EMPTY = re.compile(rf"{_}\{{{_}\}}{_}")
_TENSOR = re.compile(rf'{_}"([^"\\]*+)"{_}:{_}(\{{[^{{}}]{{0,{MAX_ENTRY_CHARS}}}+\}}){_}([,}}])')
_METADATA = re.compile(rf'{_}"({METADATA})"{_}:{_}(\{{(?:[^"{{}}]++|"(?:[^"\\]++|\\.)*+")*+\}}){_}([,}}])', re.DOTALL)
_END = re.compile(_)
_decoder = json.JSONDecoder(object_pairs_hook=reject_repeats)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies in the file: dtype, shape, its first byte and the one after its last."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: Path, size: int) -> Mapping[str, TensorEntry]:
    """Every tensor's place in a file of `size` bytes. Our checks: a whole header within bounds, no repeated name,
    float dtypes, shapes that fill their bytes; the library's: no gaps, no overlaps. AdapterError otherwise.
    """
    with file.open("rb") as stream:
        head = stream.read(8)
        if LFS_POINTER.startswith(head) and len(head) == 8 and stream.read(15) == LFS_POINTER[8:23]:
            raise AdapterError(
                "not_safetensors", f"{WEIGHTS} is a pointer of Git LFS, not the weights: run `git lfs pull`"
            )
        stream.seek(len(head))
        length = int.from_bytes(head, "little")
        if len(head) < 8 or (8 + length > size and length <= MAX_HEADER_BYTES):
            raise AdapterError(
                "truncated", f"{WEIGHTS} has {size} bytes and ends inside its header: copy the file again"
            )
        if length > MAX_HEADER_BYTES:
            raise AdapterError(
                "not_safetensors",
                f"{WEIGHTS} is not in safetensors format, or too large: its header would have {length} bytes, "
                f"expected at most {MAX_HEADER_BYTES}",
            )
        text = stream.read(length)
    try:
        entries = dict(_read_entries(text.decode("utf-8"), 8 + length))
    except (ValueError, RecursionError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError("not_safetensors", f"the header of {WEIGHTS} cannot be read: {error}") from error
    end = max((entry.stop for entry in entries.values()), default=0)
    if end > size:
        raise AdapterError("truncated", f"{WEIGHTS} has {size} bytes: its header says {end}, copy the file again")
    try:
        with safe_open(file, framework="pt"):
            return entries
    except Exception as error:  # the library raises many types; whatever it rejects, the file is at fault
        raise AdapterError("not_safetensors", f"{WEIGHTS} cannot be read: {clip(str(error))}") from error


def _read_entries(text: str, data_start: int) -> Iterator[tuple[str, TensorEntry]]:
    """Every tensor's name and place; ValueError when the text is not a header."""
    if _EMPTY.fullmatch(text):
        return
    start = _START.match(text)
    at, sign, names = start.end() if start else 0, "," if start else "", set[str]()
    while sign == ",":
        member = _TENSOR.match(text, at) or _METADATA.match(text, at, at + MAX_METADATA_CHARS)
        if member is None:
            break
        name, entry, sign = member.groups()
        if name in names or len(names) >= MAX_TENSORS:
            fault = f"the name {quote(name)} appears twice" if name in names else f"it has over {MAX_TENSORS} tensors"
            raise ValueError(fault)
        names.add(name)
        if name != METADATA:
            yield name, _read_entry(name, _decoder.raw_decode(entry)[0], data_start)
        at = member.end()
    if sign != "}" or not _END.fullmatch(text, at):
        expected = "its end" if sign == "}" else "a tensor's name and description" if start else "'{'"
        if text.startswith(f'"{METADATA}"', at):
            expected = f"metadata of texts, at most {MAX_METADATA_CHARS} characters,"
        raise ValueError(f"expected {expected} at character {at}, found {quote(text[at : at + MAX_QUOTED])}")


def _read_entry(name: str, entry: dict[str, object], data_start: int) -> TensorEntry:
    """One tensor of the header; the data start at byte `data_start`."""
    shape, offsets, kind = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    if _is_sizes(shape) and _is_sizes(offsets) and len(offsets) == 2:
        if not isinstance(kind, str) or kind not in DTYPES:
            raise AdapterError("dtype", f"tensor {quote(name)} is {quote(kind)}: expected one of {tuple(DTYPES)}")
        dtype, (start, stop) = DTYPES[kind], offsets
        if stop - start == math.prod(shape) * dtype.itemsize:
            return TensorEntry(dtype, tuple(shape), data_start + start, data_start + stop)
    raise AdapterError(
        "not_safetensors",
        f"{WEIGHTS} describes {quote(name)} as {quote(entry)}: expected dtype, shape and matching data_offsets",
    )


def _is_sizes(numbers: object) -> TypeGuard[list[int]]:
    """Whether it is a short list of numbers that a file can have; checked before anything is computed from them."""
    if not isinstance(numbers, list) or len(numbers) > MAX_DIMS:
        return False
    for number in numbers:  # noqa: SIM110 - `all` takes twice as long, and an adapter has thousands of these
        if type(number) is not int or not 0 <= number < 2**48:
            return False
    return True
