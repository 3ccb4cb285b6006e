"""The files of registered adapters, and what is made of them: stacks, fused builds, exports and plans."""

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from adapters import AdapterError, LoraAdapter, Store, load, save
from adapters.files import BUSY, write_checksums
from service.errors import ApiError
from service.fuser import Folders, Fuser, SourceError, read_source
from service.norms import Headroom
from service.placement import Placement
from service.residency import ADAPTER
from service.resolve import Fusion

T = TypeVar("T")
log = logging.getLogger("fusion")


def call_here(call: Callable[..., T], *args: Any) -> T:
    """`call` in this process."""
    return call(*args)


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
    compute: Callable[..., Any] = call_here
    """Calls what makes stacks, builds and plans with its arguments, in whatever process."""
    compute_export: Callable[..., Any] = call_here
    """Calls what makes exports."""
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
        return read_source(digest, entry)

    def open(self, digest: str) -> LoraAdapter:
        """A registered adapter whose modules are read when they are asked for; its content is not checked."""
        entry = self.sources.fetch(digest)
        if entry is None:
            raise ApiError(500, f"The stored files of adapter {self.describe(digest)!r} are gone; re-register it.")
        try:
            return load(entry / ADAPTER, lazy=True)
        except (AdapterError, OSError) as error:
            raise self._record_damage(digest, error) from error

    def write_stack(self, digests: Sequence[str], entry: Path) -> None:
        """As `Fuser.write_stack`."""
        self._call(self.compute, self._fuser.write_stack, digests, digests, entry)

    def write_build(self, fusion: Fusion, entry: Path) -> None:
        """As `Fuser.write_build`."""
        self._call(self.compute, self._fuser.write_build, fusion.parents.values(), fusion, entry)

    def export(self, fusion: Fusion, folder: Path) -> Path:
        """As `Fuser.export`."""
        written: Path = self._call(self.compute_export, self._fuser.export, fusion.parents.values(), fusion, folder)
        return written

    def plan(self, fusion: Fusion, placement: Placement) -> dict[str, Any]:
        """As `Fuser.plan`."""
        return self._call(self.compute, self._fuser.plan, fusion.parents.values(), fusion, placement)

    @property
    def _fuser(self) -> Fuser:
        return Fuser(self.max_rank, self.headroom, self.expert_shapes)

    def _call(self, compute: Callable[..., T], call: Callable[..., T], digests: Collection[str], *args: Any) -> T:
        """What `call` returns for the folders of these adapters; for a damaged one another copy is tried, else 500."""
        for _ in range(2 * len(digests)):
            try:
                result = compute(call, self._locate(digests), *args)
            except SourceError as error:
                self.source(error.digest)
                continue
            for digest in digests:
                self.damage.pop(digest, None)
            return result
        raise ApiError(
            500, "The stored files of adapters could be read at one time and not at another; check the disk."
        )

    def _locate(self, digests: Collection[str]) -> Folders:
        return {digest: self.sources.fetch(digest) or self.sources.root / digest for digest in digests}
