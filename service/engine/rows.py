"""The rows of weights that tokens of a step point at, in the workers, at an address that never changes."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapters import MAX_PHASES
from service.engine.weights import Table

ZEROS, ONES = 0, 1
"""The rows of the base and of ordinary adapters."""
BUDGET_BYTES = 256 * 2**20


def choose_capacity(slices: int, rank: int, max_seqs: int, max_tokens: int) -> int:
    """How many rows a store holds: as many as any step can need, unless they take more than `BUDGET_BYTES`, but never
    fewer than one for each sequence and all phases of one request; divisible by 4, for the alignment of its slices.
    """
    most = min(max_tokens, MAX_PHASES * max_seqs)
    least = min(max_tokens, max_seqs + MAX_PHASES - 1)
    return -(-(2 + max(least, min(most, BUDGET_BYTES // (4 * slices * rank)))) // 4) * 4


class RowStore:
    """`rows` float32 [slices, capacity, rank]: for every slice of every LoRA layer, the row of each table in use.

    Row `ZEROS` is the base's, row `ONES` that of ordinary adapters. All others are the least recently used first to
    be overwritten, and never one that the step at hand needs. `names` are the slices' modules, as vLLM calls them.
    """

    def __init__(self, names: Sequence[str], capacity: int, rank: int, device: torch.device | str) -> None:
        self.names = tuple(names)
        self.rows = torch.zeros(len(names), capacity, rank, dtype=torch.float32, device=device)
        self.rows[:, ONES] = 1.0
        self.last: Any = None
        """What the last step found; `seam` puts it here, and nothing else writes rows in between."""
        self._places: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(capacity - 1, ONES, -1))
        self._modules: np.ndarray | None = None

    @property
    def capacity(self) -> int:
        """How many tables it holds at once."""
        return self.rows.shape[1] - 2

    def part(self, start: int, count: int) -> torch.Tensor:
        """`rows` of `count` slices from `start` on: the same memory, but for a compiler no view."""
        whole = self.rows
        offset, size = start * whole.stride(0), (count, *whole.shape[1:])
        return whole.new_empty(0).set_(whole.untyped_storage(), offset, size, whole.stride())

    def spare(self, max_seqs: int, max_tokens: int) -> int | None:
        """How many rows there are beyond one for each sequence of a step; None when every step finds enough."""
        enough = self.capacity >= min(max_tokens, MAX_PHASES * max_seqs)
        return None if enough else self.capacity - max_seqs

    def number_modules(self, modules: Mapping[str, int]) -> set[int]:
        """Say which row of a table belongs to which slice, by vLLM's names; gives the rows that one does.

        Slices that no row belongs to get zeros.
        """
        places = [modules.get(name, -1) for name in self.names]
        self._modules = np.array(places)
        self.last = None
        self._places.clear()
        self._free = list(range(self.rows.shape[1] - 1, ONES, -1))
        return set(places) - {-1}

    def place(self, tables: Mapping[str, Table]) -> dict[str, int]:
        """The rows of a step's `tables`, by digest, written where they are new.

        Raises RuntimeError when there are more than rows: a wrong row is never used.
        """
        if len(tables) > self.capacity:
            raise RuntimeError(f"a step needs {len(tables)} rows of weights, there are {self.capacity}")
        places = {}
        for digest in tables:
            if (place := self._places.get(digest)) is not None:
                self._places.move_to_end(digest)
                places[digest] = place
        if len(places) < len(tables):
            self._write({digest: table for digest, table in tables.items() if digest not in places}, places)
        return places

    def _write(self, tables: Mapping[str, Table], places: dict[str, int]) -> None:
        for uniform in (True, False):
            new = [table for table in tables.values() if table.is_uniform is uniform]
            if not new:
                continue
            values = np.stack([self._spread(table) for table in new])
            for table in new:
                place = self._free.pop() if self._free else self._places.popitem(last=False)[1]
                self._places[table.digest] = places[table.digest] = place
            index = torch.tensor([places[table.digest] for table in new])
            self.rows[:, self._send(index)] = self._send(torch.from_numpy(values)).transpose(0, 1)

    def _spread(self, table: Table) -> np.ndarray:
        """[1 or slices, rank] of a table."""
        values = table.expand()
        if not table.is_uniform:
            if self._modules is None:
                raise RuntimeError("weights by module came before the modules were numbered")
            if self._modules.max(initial=0) >= len(values):
                raise RuntimeError(f"weights of {len(values)} modules: this engine has others")
            values = np.where(self._modules[:, None] >= 0, values[self._modules], np.float32(0))
        return np.pad(values, ((0, 0), (0, self.rows.shape[2] - values.shape[1])))

    def _send(self, source: torch.Tensor) -> torch.Tensor:
        if not self.rows.is_cuda:
            return source
        # A fresh pinned buffer each time: the copy of the last one may be in flight.
        return source.pin_memory().to(self.rows.device, non_blocking=True)


class TokenRows:
    """Mixed into a wrapper: the row of each token. Ones, until `seam` says otherwise."""

    fusion_store: RowStore
    fusion_index: torch.Tensor
    """int64 [max tokens]."""
    fusion_steps = 0
    """How many steps there were."""

    def make_rows(self, max_tokens: int, lora_config: Any, device: torch.device | str) -> None:
        """Rows of ordinary adapters for all tokens, alike in all layers; `slices` brings a larger store."""
        self.fusion_store = RowStore(("",), 4, lora_config.max_lora_rank, device)
        self.fusion_index = torch.full((max_tokens,), ONES, dtype=torch.int64, device=device)

    def set_rows(self, index: NDArray[np.int64] | None, uniform: bool = True) -> None:
        """Write the rows of a step's tokens, [tokens]; None for ordinary adapters'.

        `uniform` says that each of them is the same in all layers.
        """
        self.fusion_steps += 1
        if index is None:
            self.fusion_index.fill_(ONES)
            return
        source = torch.from_numpy(index)
        if self.fusion_index.is_cuda:  # a fresh pinned buffer each step: the copy of the last one may be in flight
            source = source.pin_memory()
        self.fusion_index[: len(index)].copy_(source, non_blocking=True)


def weigh(y: torch.Tensor, rows: torch.Tensor, index: torch.Tensor) -> None:
    """y [slices, tokens, rank] *= weights, which are `rows` [1 or slices, capacity, max rank] at `index` [max tokens].

    A plain product would be NaN where y is infinite. The compiler makes one kernel of this.
    """
    weights = rows[:, index[: y.size(1)], : y.size(2)]
    y.copy_(torch.where(weights == 0, 0.0, y * weights))
