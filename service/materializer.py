"""Make stacks, fused builds and exports from the stored adapters, and plan them in a dry run."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from adapters import (
    PROMPT,
    AdapterError,
    LoraAdapter,
    Store,
    complete_experts,
    fuse,
    load,
    plan,
    round_factors,
    save,
    stack,
)
from adapters.files import BUSY, CHECKSUMS, is_whole, write_checksums
from service.errors import ApiError
from service.norms import Headroom
from service.placement import Placement
from service.residency import ADAPTER, REPORT
from service.resolve import Fusion

EXPORT_REPORT = "fusion_report.json"
WEIGHTS = "adapter_model.safetensors"
"""What an adapter's digest covers."""
log = logging.getLogger("fusion")


@dataclass(frozen=True, slots=True)
class Materializer:
    """Reads and writes adapter files. Every method blocks on files and algebra: call it in a thread."""

    sources: Store
    """Registered adapters, by digest."""
    max_rank: int
    describe: Callable[[str], str] = lambda digest: digest[:12]
    """What an adapter is called, by its digest."""
    headroom: Headroom = field(default_factory=Headroom)
    expert_shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """(d_out, d_in) of the projections of the base's experts, by module."""
    damage: dict[str, str] = field(default_factory=dict)
    """Why the files of an adapter were not what they should be when they were last read, by digest."""

    def add(self, adapter: LoraAdapter) -> None:
        """Store a registered adapter's files, unless they are there and whole."""
        if self.sources.get(adapter.digest) is not None and not self.check(adapter.digest):
            self.sources.discard(adapter.digest)

        def write(entry: Path) -> None:
            save(adapter, entry / ADAPTER)
            write_checksums(entry)

        self.sources.land(adapter.digest, write)
        self.sources.publish(adapter.digest)
        self.damage.pop(adapter.digest, None)

    def remove(self, digest: str) -> None:
        """Delete an adapter's files."""
        self.sources.remove(digest)
        self.damage.pop(digest, None)

    def check(self, digest: str) -> bool:
        """Whether a registered adapter's files are what they were; `damage` says what is wrong."""
        try:
            self.source(digest)
        except ApiError:
            return False
        return True

    def measure(self, digest: str) -> float:
        """The norm of a registered adapter's update, infinite when the served dtype cannot hold it; as `source`."""
        adapter = self.source(digest)
        try:
            return self.headroom.check(adapter)
        except AdapterError:
            return math.inf

    def source(self, digest: str) -> LoraAdapter:
        """A registered adapter, its content compared with its digest; 500 when its files have changed."""
        try:
            adapter = self._read(digest)
        except (AdapterError, OSError) as error:
            raise self._record_damage(digest, error) from error
        self.damage.pop(digest, None)
        return adapter

    def _record_damage(self, digest: str, error: AdapterError | OSError) -> Exception:
        """What to raise for files that cannot be read."""
        if getattr(error, "errno", None) in BUSY:
            return error
        self.damage[digest] = str(getattr(error, "strerror", None) or error)  # without a path of this machine
        name = self.describe(digest)
        message = f"The stored files of adapter {name!r} are damaged; delete and re-register it, or re-register"
        return ApiError(500, f"{message} the same files: {self.damage[digest]}.")

    def _read(self, digest: str) -> LoraAdapter:
        try:
            return self._read_copy(digest)
        except (AdapterError, OSError) as error:
            if getattr(error, "errno", None) in BUSY or not self.sources.restore(digest):
                raise
        log.error("the stored files of %s were damaged: they are copied again", digest[:12])
        return self._read_copy(digest)

    def _read_copy(self, digest: str) -> LoraAdapter:
        entry = self.sources.fetch(digest)
        if entry is None:
            raise AdapterError("gone", "they are gone from the store")
        adapter = load(entry / ADAPTER)
        # The digest covers the weights and scalings. Those stored by earlier versions have no checksums.
        is_sealed = (entry / CHECKSUMS).exists()
        if adapter.digest != digest or (is_sealed and not is_whole(entry, unread=WEIGHTS)):
            raise AdapterError("changed", "their content has changed")
        return adapter

    def open(self, digest: str) -> LoraAdapter:
        """A registered adapter whose modules are read when they are asked for; its content is not checked."""
        entry = self.sources.fetch(digest)
        if entry is None:
            raise ApiError(500, f"The stored files of adapter {self.describe(digest)!r} are gone; re-register it.")
        try:
            return load(entry / ADAPTER, lazy=True)
        except (AdapterError, OSError) as error:
            raise self._record_damage(digest, error) from error

    def parents(self, fusion: Fusion) -> dict[str, LoraAdapter]:
        """The adapters that a fusion combines, by name."""
        return {name: self.source(digest) for name, digest in fusion.parents.items()}

    def write_stack(self, digests: Sequence[str], entry: Path) -> None:
        """Fill a store entry with the stack of these adapters, in this order."""
        stacked = stack({digest: self.source(digest) for digest in digests}, same_base=True)
        save(stacked.adapter, entry / ADAPTER)
        widths = {digest: stop - start for digest, (start, stop) in stacked.ranges.items()}
        (entry / REPORT).write_text(json.dumps({"widths": widths, "rank": stacked.rank}, allow_nan=False))
        write_checksums(entry)

    def write_build(self, fusion: Fusion, entry: Path) -> None:
        """Fill a store entry with `fusion`, built at most at the largest rank served; AdapterError 'overflow' when
        the served dtype cannot hold it.
        """
        report = self._write(fusion, entry / ADAPTER, self.max_rank, served=True)
        (entry / REPORT).write_text(json.dumps(report, allow_nan=False))
        write_checksums(entry)

    def export(self, fusion: Fusion, folder: Path) -> Path:
        """Write the exact fusion, at whatever rank, as a PEFT folder with its report inside `folder`; returns it."""
        report = self._write(fusion, folder / ADAPTER, None)
        (folder / ADAPTER / EXPORT_REPORT).write_text(json.dumps(report, indent=1, allow_nan=False))
        return folder / ADAPTER

    def plan(self, fusion: Fusion, placement: Placement) -> dict[str, Any]:
        """Dry run: how `fusion` would be served there, and what that costs in fidelity and bytes, per module and phase;
        the default weights of one with a gate.
        """
        mixed = placement.kind == "stack"
        limit = None if mixed else self.max_rank
        parents, recipe = self.parents(fusion), fusion.recipe.choose({})
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

    def _write(self, fusion: Fusion, folder: Path, max_rank: int | None, *, served: bool = False) -> Mapping[str, Any]:
        parents = self.parents(fusion)
        own = reduce(torch.promote_types, (adapter.dtype for adapter in parents.values()))
        dtype = own if served else torch.promote_types(own, torch.float32)
        built, report = fuse(fusion.recipe, parents, max_rank=max_rank, same_base=True, dtype=dtype)
        if served:
            self.headroom.check(built)
            built = complete_experts(built, self.expert_shapes)
        else:
            built = round_factors(built, None, own).adapter  # in no dtype that would change it
            report = replace(report, bytes=built.nbytes)
        provenance = {"recipe": fusion.recipe.format(), "digest": fusion.digest}
        save(built, folder, provenance=provenance, one_rank=not served)
        return report.to_json()
