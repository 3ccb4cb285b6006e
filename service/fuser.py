"""The algebra on folders of stored adapters: stacks, builds, exports and plans, in whatever process."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from cachetools import LRUCache, cached

from adapters import (
    PROMPT,
    AdapterError,
    LoraAdapter,
    complete_experts,
    fuse,
    load,
    plan,
    round_factors,
    save,
    stack,
)
from adapters.files import BUSY, CHECKSUMS, is_whole, write_checksums
from service.norms import Headroom
from service.placement import Placement
from service.residency import ADAPTER, REPORT
from service.resolve import Fusion

EXPORT_REPORT = "fusion_report.json"
WEIGHTS = "adapter_model.safetensors"
"""What an adapter's digest covers."""
KEPT_BYTES = 2**28
"""Of adapters that a process keeps in memory for its next fusions."""
Folders = Mapping[str, Path]
"""Where stored adapters lie, by digest."""


class SourceError(Exception):
    """The stored files of the adapter `digest` cannot be read, or are not what they were."""

    def __init__(self, digest: str) -> None:
        super().__init__(digest)
        self.digest = digest


def read_source(digest: str, folder: Path) -> LoraAdapter:
    """A stored adapter; AdapterError or OSError when its files cannot be read, or are not what they were."""
    adapter = load(folder / ADAPTER)
    # The digest covers the weights and scalings. Those stored by earlier versions have no checksums.
    is_sealed = (folder / CHECKSUMS).exists()
    if adapter.digest != digest or (is_sealed and not is_whole(folder, unread=WEIGHTS)):
        raise AdapterError("changed", "their content has changed")
    return adapter


@dataclass(frozen=True, slots=True)
class Fuser:
    """What a server can serve. Every method blocks on files and algebra, and raises `SourceError` for adapters that
    cannot be read.
    """

    max_rank: int
    headroom: Headroom = field(default_factory=Headroom)
    expert_shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """(d_out, d_in) of the projections of the base's experts, by module."""

    def write_stack(self, folders: Folders, digests: Sequence[str], entry: Path) -> None:
        """Fill a store entry with the stack of these adapters, in this order."""
        stacked = stack({digest: _read(digest, folders) for digest in digests}, same_base=True)
        save(stacked.adapter, entry / ADAPTER)
        widths = {digest: stop - start for digest, (start, stop) in stacked.ranges.items()}
        (entry / REPORT).write_text(json.dumps({"widths": widths, "rank": stacked.rank}, allow_nan=False))
        write_checksums(entry)

    def write_build(self, folders: Folders, fusion: Fusion, entry: Path) -> None:
        """Fill a store entry with `fusion`, built at most at the largest rank served; AdapterError 'overflow' when
        the served dtype cannot hold it.
        """
        report = self._write(folders, fusion, entry / ADAPTER, self.max_rank, served=True)
        (entry / REPORT).write_text(json.dumps(report, allow_nan=False))
        write_checksums(entry)

    def export(self, folders: Folders, fusion: Fusion, folder: Path) -> Path:
        """Write the exact fusion, at whatever rank, as a PEFT folder with its report inside `folder`; returns it."""
        report = self._write(folders, fusion, folder / ADAPTER, None)
        (folder / ADAPTER / EXPORT_REPORT).write_text(json.dumps(report, indent=1, allow_nan=False))
        return folder / ADAPTER

    def plan(self, folders: Folders, fusion: Fusion, placement: Placement) -> dict[str, Any]:
        """Dry run: how `fusion` would be served there, and what that costs in fidelity and bytes, per module and phase;
        the default weights of one with a gate.
        """
        mixed = placement.kind == "stack"
        limit = None if mixed else self.max_rank
        parents, recipe = _read_parents(folders, fusion), fusion.recipe.choose({})
        reports = [
            (start, plan(phase, parents, max_rank=limit, same_base=True).to_json()) for start, phase in recipe.phases()
        ]
        content = {
            "recipe": fusion.recipe.format(),
            "fusion": fusion.recipe.to_json(),
            "digest": fusion.digest,
            "mode": "mixed" if mixed else "built",
            "reason": placement.reason,
        }
        if fusion.recipe.is_constant:
            return {**content, **reports[0][1]}
        phases = [{"start": "prompt" if start == PROMPT else start, **report} for start, report in reports]
        return {**content, "phases": phases}

    def _write(
        self, folders: Folders, fusion: Fusion, folder: Path, max_rank: int | None, *, served: bool = False
    ) -> Mapping[str, Any]:
        parents = _read_parents(folders, fusion)
        own = reduce(torch.promote_types, (adapter.dtype for adapter in parents.values()))
        dtype = own if served else torch.promote_types(own, torch.float32)
        built, report = fuse(fusion.recipe, parents, max_rank=max_rank, same_base=True, dtype=dtype)
        if served:
            self.headroom.ensure(built)
            built = complete_experts(built, self.expert_shapes)
        else:
            built = round_factors(built, None, own).adapter  # in no dtype that would change it
            report = replace(report, bytes=built.nbytes)
        provenance = {"recipe": fusion.recipe.format(), "digest": fusion.digest}
        save(built, folder, provenance=provenance, one_rank=not served)
        return report.to_json()


def _find_state(digest: str, folder: Path) -> tuple[Any, ...]:
    """What changes when anybody writes to a stored adapter; OSError when it is gone."""
    files = [(file, file.stat()) for file in sorted(folder.rglob("*"))]
    return digest, folder, *((file, stat.st_mtime_ns, stat.st_size, stat.st_ino) for file, stat in files)


_read_kept = cached(LRUCache(KEPT_BYTES, lambda adapter: adapter.nbytes), _find_state, Lock())(read_source)
"""`read_source`, which takes half of a stack's time, of files that are as they were read last."""


def _read_parents(folders: Folders, fusion: Fusion) -> dict[str, LoraAdapter]:
    """The adapters that a fusion combines, by name."""
    return {name: _read(digest, folders) for name, digest in fusion.parents.items()}


def _read(digest: str, folders: Folders) -> LoraAdapter:
    try:
        return _read_kept(digest, folders[digest])
    except (AdapterError, OSError) as error:
        if getattr(error, "errno", None) in BUSY:
            raise
        raise SourceError(digest) from error
