"""Make stacks, fused builds and exports from the stored adapters, and plan them in a dry run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters import LoraAdapter, Store, fuse, load, plan, save, stack
from service.errors import ApiError
from service.placement import Placement
from service.residency import ADAPTER, REPORT
from service.resolve import Fusion

EXPORT_REPORT = "fusion_report.json"


@dataclass(frozen=True, slots=True)
class Materializer:
    """Reads and writes adapter files. Every method blocks on files and algebra: call it in a thread."""

    sources: Store
    """Registered adapters, by digest."""
    max_rank: int

    def add(self, adapter: LoraAdapter) -> None:
        """Store a registered adapter's files, unless they are there."""
        self.sources.land(adapter.digest, lambda entry: save(adapter, entry / ADAPTER))

    def remove(self, digest: str) -> None:
        """Delete an adapter's files."""
        self.sources.remove(digest)

    def source(self, digest: str) -> Path:
        """The PEFT folder of a registered adapter."""
        entry = self.sources.get(digest)
        if entry is None:
            raise ApiError(
                500, f"The files of adapter {digest[:12]} are gone from the store; delete and re-register it."
            )
        return entry / ADAPTER

    def parents(self, fusion: Fusion) -> dict[str, LoraAdapter]:
        """The adapters that a fusion combines, by name."""
        return {name: load(self.source(digest)) for name, digest in fusion.parents.items()}

    def write_stack(self, digests: Sequence[str], entry: Path) -> None:
        """Fill a store entry with the stack of these adapters, in this order."""
        stacked = stack({digest: load(self.source(digest)) for digest in digests})
        save(stacked.adapter, entry / ADAPTER)
        widths = {digest: stop - start for digest, (start, stop) in stacked.ranges.items()}
        (entry / REPORT).write_text(json.dumps({"widths": widths, "rank": stacked.rank}))

    def write_build(self, fusion: Fusion, entry: Path) -> None:
        """Fill a store entry with `fusion`, built at most at the largest rank served."""
        report = self._write(fusion, entry / ADAPTER, self.max_rank)
        (entry / REPORT).write_text(json.dumps(report))

    def export(self, fusion: Fusion, folder: Path) -> Path:
        """Write the exact fusion, at whatever rank, as a PEFT folder with its report inside `folder`; returns it."""
        report = self._write(fusion, folder / ADAPTER, None)
        (folder / ADAPTER / EXPORT_REPORT).write_text(json.dumps(report, indent=1))
        return folder / ADAPTER

    def plan(self, fusion: Fusion, placement: Placement) -> dict[str, Any]:
        """Dry run: how `fusion` would be served there, and what that costs in fidelity and bytes, per module."""
        mixed = placement.kind == "stack"
        report = plan(fusion.recipe, self.parents(fusion), max_rank=None if mixed else self.max_rank)
        return {
            "recipe": fusion.recipe.format(),
            "digest": fusion.digest,
            "mode": "mixed" if mixed else "built",
            "reason": placement.reason,
            **report.to_json(),
        }

    def _write(self, fusion: Fusion, folder: Path, max_rank: int | None) -> Mapping[str, Any]:
        built, report = fuse(fusion.recipe, self.parents(fusion), max_rank=max_rank)
        save(built, folder, provenance={"recipe": fusion.recipe.format(), "digest": fusion.digest})
        return report.to_json()
