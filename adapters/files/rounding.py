"""The dtype that an adapter's factors are written in, and what rounding them to it changes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapters.adapter import LoraAdapter, LoraModule, is_finite
from adapters.errors import AdapterError

AUTO = "auto"
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""What `--dtype` may name besides AUTO."""
TOLERANCE = 1e-6
"""The relative error of an update up to which AUTO keeps the adapters' own dtype; float32's own is about 1e-7."""


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """An adapter in the dtype that it is written in.

    `error` is the largest relative error (Frobenius norm) of a module's update, 0 where no number was rounded. `spared`
    is the adapters' own dtype, and the error that it would have had, where that was too much for AUTO.
    """

    adapter: LoraAdapter
    error: float
    spared: tuple[torch.dtype, float] | None = None

    def describe(self) -> str:
        """The dtype and the error, in words."""
        text = name_dtype(self.adapter.dtype)
        if self.spared is not None:
            own, error = self.spared
            return f"{text}, since {name_dtype(own)} would change a module's update by up to {error:.1e} of it"
        return f"{text}, rounded by up to {self.error:.1e} of a module's update" if self.error else text

    def to_json(self) -> dict[str, object]:
        """The dtype and the largest relative error of a module's update in it."""
        return {"dtype": name_dtype(self.adapter.dtype), "rounding": self.error}


def name_dtype(dtype: torch.dtype) -> str:
    """As DTYPES and PyTorch name it."""
    return str(dtype).removeprefix("torch.")


def round_factors(adapter: LoraAdapter, dtype: torch.dtype | None, own: torch.dtype) -> Rounded:
    """The adapter in `dtype`; for None (AUTO) in `own`, the dtype of what it was made from, unless that changes the
    update of a module by more than TOLERANCE: then as it is. AdapterError 'overflow' when `dtype` cannot hold it.
    """
    wanted = own if dtype is None else dtype
    if all(factor.dtype == wanted for module in adapter.modules.values() for factor in (module.a, module.b)):
        return Rounded(adapter, 0.0)
    modules = {name: _convert(module, wanted) for name, module in adapter.modules.items()}
    lost = next((n for n, m in modules.items() if not (is_finite(m.a) and is_finite(m.b))), None)
    if lost is not None and dtype is not None:
        way_out = " or bfloat16" * (dtype == torch.float16)
        raise AdapterError("overflow", f"module {lost!r} does not fit into {name_dtype(dtype)}: take float32{way_out}")
    error = math.inf if lost else max(measure_change(adapter.modules[name], new) for name, new in modules.items())
    if dtype is None and error > TOLERANCE:
        return Rounded(adapter, 0.0, (own, error))
    return Rounded(replace(adapter, modules=modules), error)


def measure_change(old: LoraModule, new: LoraModule) -> float:
    """‖ΔW′ − ΔW‖ / ‖ΔW‖ (Frobenius norm) of two pairs of factors of one rank, shape and scaling."""
    b, a, to_b, to_a = (factor.double() for factor in (old.b, old.a, new.b, new.a))
    # ΔW′ − ΔW = (B′ − B)·A′ + B·(A′ − A), which does not subtract large numbers.
    lost = _norm(torch.cat((to_b - b, b), 1), torch.cat((to_a, to_a - a)))
    whole = _norm(b, a)
    return 0.0 if lost == 0.0 else lost / whole if whole else math.inf


def _norm(b: Tensor, a: Tensor) -> float:
    """‖B·A‖, from the Gram matrices of the factors."""
    return math.sqrt(max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum())))


def _convert(module: LoraModule, dtype: torch.dtype) -> LoraModule:
    return replace(module, a=module.a.to(dtype), b=module.b.to(dtype))
