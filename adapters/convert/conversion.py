"""One adapter in any form that is read into a plain PEFT folder."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from adapters.adapter import LoraAdapter
from adapters.convert.source import RawAdapter, read_source, write_raw
from adapters.files.io import load, save
from adapters.files.one_rank import to_one_rank
from adapters.files.rounding import round_factors
from adapters.together import name_like

Change = Callable[[RawAdapter], RawAdapter]
"""What makes another adapter of one, before it is read as LoRA; it raises AdapterError when it cannot."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written, and what its user should know, a sentence each."""

    adapter: LoraAdapter
    notes: tuple[str, ...]


def convert(
    source: Path,
    out: Path,
    *,
    changes: Iterable[Change] = (),
    like: LoraAdapter | None = None,
    one_rank: bool = False,
    dtype: torch.dtype | None = None,
) -> Conversion:
    """Read the adapter at `source` (see `read_source`), apply `changes` in their order, and save it as the new folder
    `out`: with the module names of `like`, padded to one rank if `one_rank` (see `to_one_rank`), its factors in `dtype`
    (by default their own, unless padding would round them).

    Raises AdapterError for what cannot be read as LoRA or does not fit into `dtype`, FileExistsError when `out` exists.
    """
    raw = read_source(source)
    notes = list(raw.notes)
    for change in changes:
        raw = change(raw)
        notes += [note for note in raw.notes if note not in notes]
    with TemporaryDirectory(prefix="lora-fusion-") as scratch:
        write_raw(raw, Path(scratch))
        adapter = load(scratch)
    if like is not None:
        adapter = name_like(adapter, like)
    if one_rank:
        adapter = to_one_rank(adapter, dtype)
    if dtype is not None:
        rounded = round_factors(adapter, dtype, adapter.dtype)
        adapter = rounded.adapter
        notes += [f"the factors are written in {rounded.describe()}"] * bool(rounded.error)
    save(adapter, out)
    return Conversion(adapter, (*notes, *adapter.notes))
