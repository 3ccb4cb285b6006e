"""DoRA made into plain LoRA, by means of the base's weights: `lora-fusion convert --merge-dora BASE`."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from adapters.adapter import LoraAdapter, make_adapter
from adapters.algebra.dora import MergeReport, merge_modules
from adapters.convert.source import RawAdapter, read_source, write_raw
from adapters.errors import AdapterError, FusionError
from adapters.files.base_weights import BaseWeights
from adapters.files.io import load, save
from adapters.module_names import unwrap

_MAGNITUDE = re.compile(r"([\w.-]{1,320})\.lora_magnitude_vector(?:\.(?!weight)[\w-]{1,64})?(?:\.weight)?", re.ASCII)


@dataclass(slots=True)
class MergeDora:
    """A change for `convert`: the plain LoRA nearest to a DoRA adapter that was trained on the base in a folder.

    Of at most `rank`, or of each module's smallest rank with a relative error (Frobenius) within `max_error`; of both,
    whichever is smaller. FusionError when neither is given, or one is out of range.
    """

    base: Path
    rank: int | None = None
    max_error: float | None = None
    reports: list[MergeReport] = field(default_factory=list)
    """What each call has lost."""

    def __post_init__(self) -> None:
        if self.rank is None and self.max_error is None:
            raise FusionError(
                "merging DoRA needs --rank, the largest rank of a module, such as 64, or --max-error, the largest "
                "relative error, such as 0.05"
            )
        if self.rank is not None and self.rank < 1:
            raise FusionError(f"rank is {self.rank!r}: expected a whole number ≥ 1")
        if self.max_error is not None and not 0 <= self.max_error < 1:
            raise FusionError(f"max_error is {self.max_error!r}: expected a number from 0 to 1")

    def __call__(self, raw: RawAdapter) -> RawAdapter:
        """The adapter without DoRA. AdapterError: "dora" when it has none, "base" or "shape" for another base."""
        if not raw.config.get("use_dora"):
            raise AdapterError(
                "dora", "the adapter has no DoRA (use_dora is not true): convert it without --merge-dora"
            )
        names = {name: match for name in raw.tensors if (match := _MAGNITUDE.fullmatch(name))}
        magnitudes = {unwrap(match[1])[0]: raw.tensors[name] for name, match in names.items()}
        factors = {name: tensor for name, tensor in raw.tensors.items() if name not in names}
        plain = replace(raw, config={**raw.config, "use_dora": False}, tensors=factors)
        with TemporaryDirectory(prefix="lora-fusion-") as scratch:
            (dora := Path(scratch, "dora")).mkdir()
            write_raw(plain, dora)
            adapter = load(dora)
            weights = _Weights(BaseWeights(self.base), adapter)
            modules, report = merge_modules(
                adapter.modules, magnitudes, weights, rank=self.rank, max_error=self.max_error
            )
            self.reports.append(report)
            merged = make_adapter(modules, adapter.base, answer_only=adapter.answer_only)
            save(merged, Path(scratch, "plain"))
            return replace(read_source(Path(scratch, "plain")), notes=raw.notes)


class _Weights(Mapping[str, Tensor]):
    """The base's weights d_out×d_in by module, read when asked for."""

    def __init__(self, base: BaseWeights, adapter: LoraAdapter) -> None:
        self._base, self._adapter = base, adapter

    def __getitem__(self, module: str) -> Tensor:
        weight = self._base.read(module)
        return weight.T if self._adapter.facts[module].is_embedding else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapter.facts)

    def __len__(self) -> int:
        return len(self._adapter.facts)
