"""A LoRA adapter in memory: per module `A` (r×d_in), `B` (d_out×r), scaling s, with update ΔW = s·B·A."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Self

import numpy as np
import torch
from torch import Tensor

from adapters.errors import AdapterError, FusionError, quote
from adapters.readout import Readout

_NUMPY = {torch.uint8: np.uint8, torch.float32: np.float32, torch.float64: np.float64}


@dataclass(frozen=True, slots=True, eq=False)
class LoraModule:
    """One module's factors: `a` is r×d_in, `b` is d_out×r, both of one float dtype; the update is
    scaling·b·a.

    Of an embedding the inputs are tokens: d_in is the vocabulary's size, and the update of its weight, d_in×d_out, is
    scaling·(b·a)ᵀ.
    """

    a: Tensor
    b: Tensor
    scaling: float
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """Rows of `a`, which are the columns of `b`."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in): the shape of the base's weight."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.a.nbytes + self.b.nbytes

    @property
    def compute_dtype(self) -> torch.dtype:
        """What products of the factors are computed in: float32, float64 when a factor is float64."""
        return torch.promote_types(torch.promote_types(self.a.dtype, self.b.dtype), torch.float32)

    def delta(self) -> Tensor:
        """The dense update, d_out×d_in, in `compute_dtype`."""
        return self.scaling * (self.b.to(self.compute_dtype) @ self.a.to(self.compute_dtype))


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """What is known about a module before its factors are read: rank, (d_out, d_in), promoted dtype, bytes, kind."""

    rank: int
    shape: tuple[int, int]
    dtype: torch.dtype
    nbytes: int
    is_embedding: bool = False

    @classmethod
    def from_module(cls, module: LoraModule) -> Self:
        """The facts of a module in memory."""
        dtype = torch.promote_types(module.a.dtype, module.b.dtype)
        return cls(module.rank, module.shape, dtype, module.nbytes, module.is_embedding)


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """Modules by the base's own names, sorted. Build it with `make_adapter`, which checks them, or `io.load`.

    `base` is what the adapter says it was trained on (None when it does not say). `modules` may read each
    module from its file when asked for it (`load(…, lazy=True)`); `facts` never does.
    """

    modules: Mapping[str, LoraModule]
    base: str | None
    notes: tuple[str, ...] = ()
    """What of its files was not used, or read otherwise than it says, for its user; a sentence each."""
    copies: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the copies of the base's weights in its files, which were left out, by the weights' names."""
    gate: Readout | None = None
    """How its value is read, when it is a gate and no adapter to be fused."""
    answer_only: bool = False
    """Whether it acts from the prompt's last token on, which predicts the answer's first, and not before."""
    weight_range: tuple[float, float] | None = None
    """The weights that its maker recommends, lowest and highest; no part of its content."""

    @cached_property
    def digest(self) -> str:
        """sha256 hex of the content, without `base`; computed, and everything read, on first use."""
        digest = _hash_modules(self.modules, answer_only=self.answer_only)
        return digest if self.gate is None else hashlib.sha256(f"{digest}/{self.gate.to_text()}".encode()).hexdigest()

    @cached_property
    def facts(self) -> Mapping[str, ModuleFacts]:
        """Ranks, shapes and dtypes by module."""
        from_header: Mapping[str, ModuleFacts] | None = getattr(self.modules, "facts", None)
        return from_header or {name: ModuleFacts.from_module(module) for name, module in self.modules.items()}

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(facts.rank for facts in self.facts.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds every factor (promoted when modules differ)."""
        return reduce(torch.promote_types, (facts.dtype for facts in self.facts.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(facts.nbytes for facts in self.facts.values())

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) by module."""
        return {name: facts.shape for name, facts in self.facts.items()}

    def delta(self, module: str) -> Tensor:
        """The dense update of one module, d_out×d_in, float32 or better; FusionError for a module it lacks."""
        if module not in self.modules:
            raise FusionError(f"the adapter has no module {quote(module)}: its first ones are {list(self.modules)[:3]}")
        return self.modules[module].delta()


def make_adapter(modules: Mapping[str, LoraModule], base: str | None, *, answer_only: bool = False) -> LoraAdapter:
    """Check shapes and sort by module name. AdapterError 'missing_weights', 'shape', 'dtype' or 'nan'."""
    if not modules:
        raise AdapterError("missing_weights", "the adapter has no LoRA module: expected at least one")
    for name, module in modules.items():
        _check_module(name, module)
    ordered = dict(sorted(modules.items()))
    return LoraAdapter(ordered, base, answer_only=answer_only)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """An uninitialized tensor. On the CPU NumPy allocates it, since it asks the system for huge pages, and filling
    them does not fault at every 4 KiB.
    """
    if dtype not in _NUMPY or torch.device(device or "cpu").type != "cpu":
        return torch.empty(*shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(shape, _NUMPY[dtype]))


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite, in one pass."""
    low, high = torch.aminmax(tensor)
    return math.isfinite(low) and math.isfinite(high)


def _check_module(name: str, module: LoraModule) -> None:
    a, b = tuple(module.a.shape), tuple(module.b.shape)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a or 0 in b:
        raise AdapterError("shape", f"module {name!r} has A {a} and B {b}: expected r×d_in and d_out×r, r >= 1")
    if not (module.a.is_floating_point() and module.b.is_floating_point()):
        raise AdapterError("dtype", f"module {name!r} has {module.a.dtype} and {module.b.dtype}: expected floats")
    if not math.isfinite(module.scaling):
        raise AdapterError("nan", f"module {name!r} has the scaling {module.scaling!r}: expected a finite number")


def _hash_modules(modules: Mapping[str, LoraModule], *, answer_only: bool) -> str:
    """sha256 hex over every module's name, scaling, dtypes, shapes and bytes, in sorted order."""
    digest = hashlib.sha256(b'"answer_only"\n' * answer_only)
    for name in modules:
        module = modules[name]
        factors = (module.a, module.b)
        kinds = [[str(factor.dtype), *factor.shape] for factor in factors]
        facts = [name, float(module.scaling).hex(), kinds, *["embedding"] * module.is_embedding]
        digest.update(json.dumps(facts).encode() + b"\n")
        for factor in factors:
            digest.update(factor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
