"""DoRA as plain LoRA: what it changes of a weight, and the best update of a low rank for it.

DoRA (https://arxiv.org/abs/2402.09353) has W′ = m · (W + s·B·A) / ‖W + s·B·A‖, with a norm and a magnitude m for each
row. The difference W′ − W is of full rank as soon as one magnitude differs from its norm, so a LoRA of it is an
approximation; its error is stated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from adapters.adapter import LoraModule
from adapters.algebra.lowrank import DOUBLE, truncate_dense
from adapters.errors import AdapterError, quote


@dataclass(frozen=True, slots=True)
class MergedModule:
    """One module: the rank of its LoRA, ‖W′ − W‖, and the relative error (Frobenius) of the LoRA as it is written."""

    module: str
    rank: int
    norm: float
    error: float


@dataclass(frozen=True, slots=True)
class MergeReport:
    """A whole adapter: the largest rank, and the relative error (Frobenius) over all modules."""

    rank: int
    error: float
    modules: tuple[MergedModule, ...]

    def to_json(self) -> dict[str, object]:
        """All fields in JSON types."""
        content = asdict(self)
        return {**content, "modules": list(content["modules"])}

    def table(self) -> str:
        """The error in all and one line per module."""
        width = max(len("module"), *(len(row.module) for row in self.modules))
        lines = [
            f"rank {self.rank}, relative error {self.error:.3g} in all",
            "",
            f"{'module':<{width}}  rank    error  ‖W′ - W‖",
        ]
        lines += [f"{row.module:<{width}}  {row.rank:>4}  {row.error:>7.3g}  {row.norm:>8.4g}" for row in self.modules]
        return "\n".join(lines)


def make_report(rows: Sequence[MergedModule]) -> MergeReport:
    """The report of all modules."""
    total = sum(row.norm**2 for row in rows)
    lost = sum((row.error * row.norm) ** 2 for row in rows)
    return MergeReport(max(row.rank for row in rows), math.sqrt(lost / total) if total else 0.0, tuple(rows))


def find_difference(name: str, weight: Tensor, module: LoraModule, magnitude: Tensor) -> Tensor:
    """W′ − W of a base's `weight` [d_out, d_in], an embedding's transposed, and `magnitude` [d_out], in the module's
    compute dtype; AdapterError 'shape' when they do not fit, 'nan' when a row of the weight is zero.
    """
    if tuple(weight.shape) != module.shape or magnitude.numel() != module.shape[0]:
        raise AdapterError(
            "shape",
            f"module {quote(name)} is {module.shape} with {magnitude.numel()} magnitudes, the base's weight "
            f"{tuple(weight.shape)} (d_out, d_in): the adapter is of another base",
        )
    weight = weight.to(module.compute_dtype)
    adapted = weight + module.delta()
    norm = torch.linalg.vector_norm(adapted, dim=1, dtype=DOUBLE)
    scale = (magnitude.flatten().to(DOUBLE) / norm).to(weight.dtype)
    if not bool(torch.isfinite(scale).all()):
        raise AdapterError("nan", f"module {quote(name)} has a row of norm zero, or a magnitude that is not finite")
    return adapted.mul_(scale[:, None]).sub_(weight)


def approximate(
    name: str, difference: Tensor, like: LoraModule, *, rank: int | None, max_error: float | None
) -> tuple[LoraModule, MergedModule]:
    """The best LoRA of `rank` for a difference [d_out, d_in], or of the smallest rank within the relative
    `max_error`, in the dtypes of `like`; its error is measured on the numbers that are written.
    """
    limit = min(difference.shape) if rank is None else rank
    if max_error is not None:
        limit = min(limit, _find_rank(difference, max_error))
    factors = truncate_dense(difference, limit).factors
    assert factors is not None
    b, a = factors.b.to(like.b.dtype).contiguous(), factors.a.to(like.a.dtype).contiguous()
    module = LoraModule(a, b, 1.0, like.is_embedding)
    norm = float(torch.linalg.vector_norm(difference, dtype=DOUBLE))
    lost = float(torch.linalg.vector_norm(difference - module.delta(), dtype=DOUBLE))
    return module, MergedModule(name, module.rank, norm, lost / norm if norm else 0.0)


def _find_rank(difference: Tensor, max_error: float) -> int:
    """The smallest rank whose best approximation is within `max_error` of ‖difference‖."""
    wide = difference if difference.shape[0] <= difference.shape[1] else difference.T
    wide = wide.to(DOUBLE)
    energies = torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0).flip(0)
    left = energies.sum() - energies.cumsum(0)
    return int((left > max_error**2 * energies.sum()).sum()) + 1


def merge_modules(
    modules: Mapping[str, LoraModule],
    magnitudes: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    rank: int | None,
    max_error: float | None,
) -> tuple[dict[str, LoraModule], MergeReport]:
    """Every module of a DoRA adapter as plain LoRA. `weights` has the base's, d_out×d_in, read when asked for."""
    merged, rows = {}, []
    for name, module in modules.items():
        if name not in magnitudes:
            raise AdapterError("dora", f"module {quote(name)} has no magnitudes: expected lora_magnitude_vector")
        difference = find_difference(name, weights[name], module, magnitudes[name])
        merged[name], row = approximate(name, difference, module, rank=rank, max_error=max_error)
        rows.append(row)
    return merged, make_report(rows)
