"""How large an adapter's update may be: what the served dtype holds, with a margin, measured before it is served.

In every module the engine computes x·Aᵀ, times the weight, times scaling·B. With spectral norms, |x·Aᵀ| <= |x| ‖A‖ and
|update| <= |x| ‖A‖ ‖s·B‖, for every part of the sum over coordinates too, so that numbers which cancel in the end are
bounded on the way. In a mix the bounds add up, times the weights. That leaves the input |x|: it was normalized, so
sqrt(d) times a norm's weight, 64 for d = 4096 and weights around 1.

- The update must fit into the served dtype: N·64 <= its largest number, N being the weighted ‖A‖ ‖s·B‖.
- What follows must fit into float32, in which vLLM computes norms and attention. The largest is the square, for a
  root mean square, of a down projection of gate times up, each of them a sum with an update: (N·(64·N)²)² <= 3.4e38,
  so N <= 1.6e5.

So N is at most 1,023 in float16 and 1.6e5 in bfloat16 and float32. Trained adapters have norms of about 0.1 to 20. It
is no proof, since a base may have larger inputs of its own: what still overflows ends with an error (`engine.runners`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters import AdapterError, LoraAdapter, LoraModule

INPUT_NORM = 64.0


@dataclass(frozen=True, slots=True)
class Headroom:
    """What a server that computes in `dtype` can hold."""

    dtype: torch.dtype = torch.float32

    @property
    def largest_norm(self) -> float:
        """Upper limit of the weighted ‖A‖ ‖s·B‖."""
        for_update = torch.finfo(self.dtype).max / INPUT_NORM
        for_square = math.cbrt(math.sqrt(torch.finfo(torch.float32).max) / INPUT_NORM**2)
        return min(for_update, for_square)

    def check(self, adapter: LoraAdapter, *, max_weight: float = 1.0) -> float:
        """Largest ‖A‖ ‖s·B‖ of the adapter's modules.

        AdapterError 'overflow' when the dtype cannot hold a factor, or at `max_weight` what is computed with them.
        """
        norm = max(self._measure_module(name, module, max_weight) for name, module in adapter.modules.items())
        if not norm * max_weight <= self.largest_norm:
            at = "" if max_weight == 1.0 else f" and weights reach FUSION_MAX_WEIGHT={max_weight:g}"
            raise AdapterError(
                "overflow",
                f"the update is too large for {self}: its norm is {norm:.3g}{at}, and weight times norm may be at most "
                f"{self.largest_norm:.4g}; check lora_alpha and that the training did not diverge",
            )
        return norm

    def ensure(self, adapter: LoraAdapter) -> None:
        """AdapterError as `check`, asked only where Frobenius norms, never smaller, do not fit."""
        if not all(map(self._surely_fits, adapter.modules.values())):
            self.check(adapter)

    def _surely_fits(self, module: LoraModule) -> bool:
        """False also for numbers that are not finite."""
        a, b = module.a.to(self.dtype), module.b.to(self.dtype) * module.scaling
        norm_a, norm_b = (float(torch.linalg.vector_norm(factor, dtype=torch.float64)) for factor in (a, b))
        return norm_a <= torch.finfo(self.dtype).max / INPUT_NORM and norm_a * norm_b <= self.largest_norm

    def _measure_module(self, name: str, module: LoraModule, max_weight: float) -> float:
        # As vLLM does: cast, then the scaling is multiplied into B.
        a, b = module.a.to(self.dtype), module.b.to(self.dtype) * module.scaling
        # An embedding's input picks one column of A, whatever its norm.
        norm_a = _largest_column(a) / INPUT_NORM if module.is_embedding else _spectral_norm(a)
        norms = [norm_a, _spectral_norm(b)]
        if not (norms[1] < math.inf and norms[0] * max_weight <= torch.finfo(self.dtype).max / INPUT_NORM):
            raise AdapterError(
                "overflow",
                f"module {name!r} has numbers that overflow {self}: the largest of A is "
                f"{float(module.a.abs().max()):.3g}, of B {float(module.b.abs().max()):.3g}, with the scaling "
                f"{module.scaling:.3g}; check lora_alpha and that the training did not diverge",
            )
        return norms[0] * norms[1]

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def _largest_column(factor: Tensor) -> float:
    """The largest norm of a column, in float64; infinite when a number is."""
    norm = float(torch.linalg.vector_norm(factor.double(), dim=0).max())
    return norm if math.isfinite(norm) else math.inf


def _spectral_norm(factor: Tensor) -> float:
    """The largest singular value, from the smaller Gram matrix in float64; infinite when a number is."""
    if not bool(torch.isfinite(factor).all()):
        return math.inf
    wide = factor.double()
    gram = wide @ wide.mT if wide.shape[0] <= wide.shape[1] else wide.mT @ wide
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram)[-1])))
