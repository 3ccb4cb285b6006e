"""Weights that are functions: of the module, of the rank component, of the position.

A mix has up to `MAX_PHASES` phases, each with weights of its own: one for the prompt, one from the answer's n-th token
on, and so on. Answer token n is computed by the input position before it, prompt tokens - 1 + n; so the weights of a
phase that starts at token n act from that position on, and those of the prompt at all positions before the prompt's
last. Where every phase says the same for all modules and ranges, this is the plain mix of `names`.

The whole function travels in the name of the mix's `LoRARequest`. Who reads it gets tables that are equal where they
act equally, however they were written, and known by a digest: one row in the workers, one key in the prefix cache.
"""

import hashlib
import json
import zlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapters import MAX_PHASES, PROMPT
from service.engine.names import PREFIX, mix_name, weight_row

FAR = 2**62
"""A position that no request reaches."""
MAX_BYTES = 2 * 2**20
"""Of all numbers of one function, float32."""
FUNCTION = "~function/"
"""What names of mixes begin with that are not plain; `~` cannot start a public name."""
CACHE_BYTES = 128 * 2**20
"""Of functions that a process has read and keeps."""


@dataclass(frozen=True, slots=True, eq=False)
class Phase:
    """Weights from `start` on: `PROMPT`, or the answer's token of that number, the first is 0.

    `weights` float32 [1 or modules, ranges or coordinates]: one row for all modules, or one for each of the engine's
    modules in their order (`Engine.modules`); one number for each adapter's range of coordinates, or for each
    coordinate. Takes whatever numpy makes such an array of; a list of numbers is one row.
    """

    start: int
    weights: NDArray[np.float32]

    def __init__(self, start: int, weights: ArrayLike) -> None:
        with np.errstate(over="ignore"):  # refused below
            values = np.atleast_2d(np.asarray(weights, dtype=np.float32))
        if values.ndim != 2 or not values.size:
            raise ValueError(f"weights of shape {values.shape}: expected [1 or modules, ranges or coordinates]")
        if not np.isfinite(values).all():
            raise ValueError("a weight is not finite in float32: use smaller ones")
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "weights", values)


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """The weights of a mix as a function: `widths` of its stack's coordinate ranges, and its phases in order.

    Raises ValueError unless the first phase is the prompt's, starts ascend, and all shapes fit.
    """

    widths: tuple[int, ...]
    phases: tuple[Phase, ...]
    names: dict[str, str] = field(default_factory=dict, repr=False)
    """By stack: a large function takes tens of milliseconds to encode."""

    def __post_init__(self) -> None:
        starts = [phase.start for phase in self.phases]
        if not 1 <= len(starts) <= MAX_PHASES:
            raise ValueError(f"{len(starts)} phases: expected 1 to {MAX_PHASES}")
        if starts[0] != PROMPT or any(a >= b for a, b in pairwise(starts)):
            raise ValueError(f"phases start at {starts}: expected {PROMPT} (the prompt), then ascending numbers from 0")
        shapes = [phase.weights.shape for phase in self.phases]
        columns = {len(self.widths), sum(self.widths)}
        if len({rows for rows, _ in shapes} - {1}) > 1 or not {width for _, width in shapes} <= columns:
            raise ValueError(f"weights of shapes {shapes}: expected 1 or as many rows as modules, {columns} columns")
        if (size := sum(phase.weights.nbytes for phase in self.phases)) > MAX_BYTES:
            raise ValueError(f"{size} bytes of weights, the limit is {MAX_BYTES}: use fewer phases, or no components")

    @property
    def modules(self) -> int:
        """How many modules the weights tell apart; 1 when they tell none apart."""
        return max(len(phase.weights) for phase in self.phases)

    @property
    def is_plain(self) -> bool:
        """Whether this is one number per adapter, everywhere."""
        return len(self.phases) == 1 and self.phases[0].weights.shape == (1, len(self.widths))


def function_name(stack: str, weights: Weights) -> str:
    """Name of a mix over `stack`; that of a plain mix is `mix_name`'s."""
    if weights.is_plain:
        return mix_name(stack, list(zip(weights.widths, weights.phases[0].weights[0].tolist(), strict=True)))
    if stack not in weights.names:
        shapes = [[phase.start, *phase.weights.shape] for phase in weights.phases]
        parts = [json.dumps([weights.widths, shapes]).encode(), b"\n", *(p.weights.tobytes() for p in weights.phases)]
        text = urlsafe_b64encode(zlib.compress(b"".join(parts), 1)).decode()
        weights.names[stack] = f"{FUNCTION}{stack}/{text}"
    return weights.names[stack]


def _read_weights(text: str) -> Weights:
    header, _, data = zlib.decompress(urlsafe_b64decode(text)).partition(b"\n")
    widths, shapes = json.loads(header)
    values = np.frombuffer(data, dtype=np.float32)
    ends = np.cumsum([rows * columns for _, rows, columns in shapes])[:-1]
    parts = zip(shapes, np.split(values, ends), strict=True)
    return Weights(tuple(widths), tuple(Phase(start, part.reshape(r, c)) for (start, r, c), part in parts))


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Table:
    """Weights of one phase as they act. Tables with one digest act equally.

    `values` float32 [1 or modules, ranges or coordinates]; one row acts on all modules.
    """

    values: NDArray[np.float32]
    widths: tuple[int, ...]
    digest: str
    is_zero: bool

    @property
    def is_uniform(self) -> bool:
        """Whether all modules have the same weights."""
        return len(self.values) == 1

    def expand(self) -> NDArray[np.float32]:
        """One number per coordinate, float32 [1 or modules, coordinates]."""
        return _expand(self.values, self.widths)


def _expand(values: NDArray[np.float32], widths: tuple[int, ...]) -> NDArray[np.float32]:
    return np.repeat(values, widths, axis=1) if values.shape[1] == len(widths) else values


def make_table(values: NDArray[np.float32], widths: tuple[int, ...]) -> Table:
    """The table of `values` [1 or modules, ranges or coordinates]."""
    values = values + np.float32(0)  # minus zero acts like zero
    if (values == values[:1]).all():
        values = values[:1].copy()
    whole = np.ascontiguousarray(_expand(values, widths))
    digest = hashlib.blake2b(whole.tobytes(), digest_size=16, key=repr(whole.shape).encode()).hexdigest()
    return Table(values, widths, digest, not values.any())


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """A mix as its name says: `tables[i]` acts from `starts[i]` on, the first at the prompt."""

    stack: str
    starts: tuple[int, ...]
    tables: tuple[Table, ...]

    @property
    def modules(self) -> int:
        """How many modules its tables tell apart; 1 when they tell none apart."""
        return max(len(table.values) for table in self.tables)

    def phase(self, position: int, prompt: int) -> tuple[Table, int, int]:
        """The table that acts at an input position after a prompt of `prompt` tokens, and from which position to before
        which one it does.
        """
        if len(self.tables) == 1:
            return self.tables[0], 0, FAR
        i = max(0, bisect_right(self.starts, position - prompt + 1) - 1)
        since = prompt - 1 + self.starts[i] if i else 0
        return self.tables[i], since, prompt - 1 + self.starts[i + 1] if i + 1 < len(self.starts) else FAR

    def spans(self, begin: int, end: int, prompt: int) -> Iterator[tuple[Table, int]]:
        """(table, count) of the input positions from `begin` to before `end`, after a prompt of `prompt` tokens."""
        while begin < end:
            table, _, until = self.phase(begin, prompt)
            count = min(until, end) - begin
            yield table, count
            begin += count

    def key(self, begin: int, end: int, prompt: int) -> str | None:
        """What tells key-value blocks of these positions apart; None when no weight acts there, as for the base."""
        spans = list(self.spans(begin, end, prompt))
        if all(table.is_zero for table, _ in spans):
            return None
        groups = groupby(spans, key=lambda span: span[0].digest)
        return f"{PREFIX}{self.stack}/" + "+".join(f"{d}:{sum(n for _, n in group)}" for d, group in groups)


class MixReader:
    """Reads names of mixes, each once while it is in use; keeps `budget` bytes of them."""

    def __init__(self, budget: int = CACHE_BYTES) -> None:
        self._budget = budget
        self._size = 0
        self._mixes: OrderedDict[str, Mix] = OrderedDict()
        self._tables: WeakValueDictionary[str, Table] = WeakValueDictionary()

    def read(self, name: str) -> Mix | None:
        """The mix of this name; None when it is not one."""
        mix = self._mixes.get(name)
        if mix is not None:
            self._mixes.move_to_end(name)
            return mix
        if not name.startswith((PREFIX, FUNCTION)):
            return None
        mix = self._mixes[name] = self._parse(name)
        self._size += _measure(name, mix)
        while self._size > self._budget and len(self._mixes) > 1:
            self._size -= _measure(*self._mixes.popitem(last=False))
        return mix

    def _parse(self, name: str) -> Mix:
        prefix, _, rest = name.partition("/")
        stack, _, text = rest.rpartition("/")
        if f"{prefix}/" == FUNCTION:
            weights = _read_weights(text)
            tables = [make_table(phase.weights, weights.widths) for phase in weights.phases]
            starts = tuple(phase.start for phase in weights.phases)
        else:
            row = weight_row(name)
            assert row is not None
            tables, starts = [make_table(row[None], (1,) * row.size)], (PROMPT,)
        return Mix(stack, starts, tuple(self._tables.setdefault(table.digest, table) for table in tables))


def _measure(name: str, mix: Mix) -> int:
    """Bytes of a mix that is kept, about."""
    return len(name) + sum(500 + table.values.nbytes for table in mix.tables)


read_mix = MixReader().read
"""The mix of a name, None when it is not one; for all of this process."""
