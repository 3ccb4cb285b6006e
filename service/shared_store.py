"""A store in two places: this server's own folder, and one that all replicas see, from which it copies what it needs.

What a key stands for never changes, so a copy is never stale, and what a replica has in use nobody can take away.
"""

import os
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from adapters import Entry, Store
from adapters.files import CHECKSUMS, is_whole, write_checksums
from service.errors import ApiError

GRACE_S = 3600.0
"""How long what nothing needs stays in the shared place: a replica may be about to register or to copy it."""
MAX_COLLECTED = 16
"""Entries that are removed at once."""
IDENTITY = "registry-"


class Remote(Protocol):
    """The place that all replicas see. Entries appear whole or not at all."""

    def has(self, key: str) -> bool:
        """Whether the entry is there; marks it as used now."""

    def fetch(self, key: str, folder: Path) -> bool:
        """Copy the entry into `folder`, which is empty, and mark it as used now; False when it is not there."""

    def publish(self, key: str, folder: Path) -> None:
        """Make `folder` the entry `key`, unless there is one."""

    def remove(self, key: str) -> None:
        """Remove the entry."""

    def entries(self) -> list[Entry]:
        """All entries, least recently used first."""

    def evict(self) -> None:
        """Remove what is over the budget, least recently used first."""


class FolderRemote:
    """A folder of a file system that all replicas have mounted."""

    def __init__(self, root: Path, *, budget_bytes: int) -> None:
        self._store = Store(root, budget_bytes=budget_bytes)
        self.remove, self.entries = self._store.remove, self._store.entries

    def has(self, key: str) -> bool:
        """Whether the entry is there; marks it as used now."""
        return self._store.get(key) is not None

    def fetch(self, key: str, folder: Path) -> bool:
        """Copy the entry into `folder`; False when it is not there, or goes meanwhile."""
        if (source := self._store.get(key)) is None:
            return False
        try:
            copy_files(source, folder)
        except FileNotFoundError:
            return False
        return True

    def publish(self, key: str, folder: Path) -> None:
        """Copy `folder` beside its place and rename it."""
        self._store.land(key, lambda entry: copy_files(folder, entry))

    def evict(self) -> None:
        """Remove what is over the budget."""
        self._store.evict(())


class _MissingError(Exception):
    pass


class SharedStore(Store):
    """A store of this server's own, backed by a `Remote`."""

    def __init__(self, root: str | os.PathLike[str], remote: Remote, *, budget_bytes: int) -> None:
        super().__init__(root, budget_bytes=budget_bytes)
        self._remote = remote

    def fetch(self, key: str) -> Path | None:
        """The folder of `key`, copied from the shared place when it is not here; None when it is in neither."""

        def copy(folder: Path) -> None:
            if not self._remote.fetch(key, folder):
                raise _MissingError
            if not is_whole(folder):
                self._remote.remove(key)  # whoever makes it next publishes it anew
                raise _MissingError

        try:
            return self.land(key, copy)
        except _MissingError:
            return None

    def publish(self, key: str) -> None:
        """Copy `key`, if it is here, to the shared place, if it is not there; ApiError 507 when that fails."""
        if (path := self.get(key)) is None or self._remote.has(key):
            return
        if not (path / CHECKSUMS).exists():  # of an earlier version
            write_checksums(path)
        try:
            self._remote.publish(key, path)
        except OSError as error:  # no lack of room here
            raise ApiError(507, f"The store that replicas share failed: {error.strerror or error}.") from error

    def evict(self, keep: Collection[str], need: int = 0) -> list[str]:
        """As of a store, and remove what is over the budget in the shared place, where nothing is in use."""
        removed = super().evict(keep, need)
        self._remote.evict()
        return removed

    def collect(self, is_needed: Callable[[str], bool]) -> list[str]:
        """Remove some of what nothing needs, and nobody has used for `GRACE_S`, from the shared place; their keys."""
        old = [entry.key for entry in self._remote.entries() if entry.last_used < time.time() - GRACE_S]
        idle = [key for key in old if not is_needed(key)][:MAX_COLLECTED]
        for key in idle:
            self._remote.remove(key)
        return idle


def open_remotes(place: str, identity: str, *, builds_bytes: int) -> tuple[Remote, Remote]:
    """The shared places of adapters and of builds at `place`, a folder, for the registry `identity`.

    RuntimeError when it belongs to another registry, or to a server that does not share.
    """
    root = Path(place)
    root.mkdir(parents=True, exist_ok=True)
    if (root / "lock").exists():
        raise RuntimeError(f"FUSION_STORE={place!r} is the data folder of a server: choose a folder of its own")
    own = root / f"{IDENTITY}{identity}"
    if not own.exists() and (others := [path.name for path in root.glob(f"{IDENTITY}*")]):
        message = f"FUSION_STORE={place!r} belongs to another registry ({others[0]!r}): choose another folder, or"
        raise RuntimeError(f"{message} that registry's FUSION_DATABASE")
    own.touch()
    adapters = FolderRemote(root / "adapters", budget_bytes=2**63 - 1)
    return adapters, FolderRemote(root / "builds", budget_bytes=builds_bytes)


def copy_files(source: Path, target: Path) -> None:
    """Copy all files under `source` into the folder `target`."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            shutil.copyfile(path, place)
