"""A store in two places: this server's own folder, and one that all replicas see, from which it copies what it needs.

What a key stands for never changes, so a copy is never stale, and what a replica has in use nobody can take away.
"""

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Protocol

from adapters import Entry, Store
from adapters.files import CHECKSUMS, is_whole, write_checksums
from service.errors import ApiError

GRACE_S = 3600.0
"""How long what nothing needs stays in the shared place: a replica may be about to register or to copy it."""
MAX_COLLECTED = 16
"""Entries that are removed at once."""
EVICT_S = 60.0
"""How often one replica looks whether the shared place is over its budget, which takes a list of all entries."""
IDENTITY = "registry-"
CLOCK = "clock"
FULL = (errno.ENOSPC, errno.EDQUOT)
log = logging.getLogger("fusion")


class SharedStoreError(ApiError):
    """The shared place failed: 507 when it is full, else 503."""

    def __init__(self, error: OSError) -> None:
        is_full = error.errno in FULL
        advice = "give it room" if is_full else "try again, or see that every replica can reach FUSION_STORE"
        super().__init__(
            507 if is_full else 503, f"The store that replicas share failed: {error.strerror or error}; {advice}."
        )


class DamagedEntryError(Exception):
    """An entry is not what was published, as far as this reading shows; the message says what is wrong."""


class Remote(Protocol):
    """The place that all replicas see. Entries appear whole or not at all. OSError when the place fails."""

    def has(self, key: str) -> bool:
        """Whether the entry is there; marks it as used now."""

    def fetch(self, key: str, folder: Path) -> bool:
        """Copy the entry into `folder`, which is empty, and mark it as used now; False when it is not there.

        DamagedEntryError where it can be seen to be damaged.
        """

    def publish(self, key: str, folder: Path) -> None:
        """Make `folder` the entry `key`, unless there is one."""

    def remove(self, key: str) -> None:
        """Remove the entry."""

    def entries(self) -> list[Entry]:
        """All entries, least recently used first."""

    def evict(self) -> None:
        """Remove what is over the budget, least recently used first."""

    def now(self) -> float:
        """The time by the clock that entries are marked with, which need not be this machine's."""


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
            if not self._store.root.is_dir():
                raise FileNotFoundError(errno.ENOENT, "its folder is not mounted")
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

    def now(self) -> float:
        """The time of a file that is touched now: a server of files has a clock of its own."""
        clock = self._store.root / CLOCK
        clock.touch()
        return clock.stat().st_mtime


class _MissingError(Exception):
    pass


class SharedStore(Store):
    """A store of this server's own, backed by a `Remote`."""

    def __init__(
        self, root: str | os.PathLike[str], remote: Remote, *, budget_bytes: int, only_reads: bool = False
    ) -> None:
        """`only_reads`: what is damaged in the shared place is left there, too."""
        super().__init__(root, budget_bytes=budget_bytes)
        self._remote = remote
        self._only_reads = only_reads
        self._evict_after = 0.0

    def fetch(self, key: str) -> Path | None:
        """The folder of `key`, copied from the shared place when it is not here; None when it is in neither.

        `SharedStoreError` when that place fails; OSError when the disk here is full.
        """

        try:
            return self.land(key, partial(self._copy, key))
        except _MissingError:
            return None
        except OSError as error:
            if error.errno in FULL:  # of the disk here: the shared place is only read
                raise
            raise SharedStoreError(error) from error

    def _copy(self, key: str, folder: Path) -> None:
        """Fill `folder` with the entry; _MissingError when it is not there, or damaged there, and then it is removed:
        whoever makes it next publishes it anew. Judged by two readings, since one may fail by itself.
        """
        for _ in range(2):
            try:
                if not self._remote.fetch(key, folder):
                    raise _MissingError
                if is_whole(folder):
                    return
                fault = "its files are not as they were written"
            except DamagedEntryError as error:
                fault = str(error)
            shutil.rmtree(folder)
            folder.mkdir()
        log.error("%s in the shared store is damaged: %s", key[:12], fault)
        if not self._only_reads:
            self._remote.remove(key)
        raise _MissingError

    def publish(self, key: str) -> None:
        """Copy `key`, if it is here, to the shared place, if it is not there; `SharedStoreError` when that fails."""
        try:
            if (path := self.get(key)) is None or self._remote.has(key):
                return
            if not (path / CHECKSUMS).exists():  # of an earlier version
                write_checksums(path)
            self._remote.publish(key, path)
            if time.monotonic() > self._evict_after:
                self._evict_after = time.monotonic() + EVICT_S
                self._remote.evict()
        except OSError as error:
            raise SharedStoreError(error) from error

    def restore(self, key: str) -> bool:
        """Copy `key` anew from the shared place; False when it is not there, or damaged there, too."""
        try:
            if not self._remote.has(key):
                return False
        except OSError as error:
            raise SharedStoreError(error) from error
        self.remove(key)
        return self.fetch(key) is not None

    def discard(self, key: str) -> None:
        """Remove `key` here and from the shared place."""
        self.remove(key)
        self.withdraw([key])

    def tend(self, is_needed: Callable[[str], bool]) -> list[str]:
        """Publish what is needed and here, and no longer there; returns keys there that nothing needs, and nobody has
        used for `GRACE_S`.
        """
        try:
            entries = self._remote.entries()
            for key in {entry.key for entry in self.entries()} - {entry.key for entry in entries}:
                if is_needed(key):
                    self.publish(key)
            oldest = self._remote.now() - GRACE_S
            return [entry.key for entry in entries if entry.last_used < oldest and not is_needed(entry.key)]
        except OSError as error:
            raise SharedStoreError(error) from error

    def withdraw(self, keys: Collection[str]) -> None:
        """Remove these from the shared place."""
        try:
            for key in keys:
                self._remote.remove(key)
        except OSError as error:
            raise SharedStoreError(error) from error


def claim_folder(place: str, identity: str) -> None:
    """Make `place` the folder that replicas of the registry `identity` share.

    RuntimeError when it belongs to another registry, or to a server that does not share.
    """
    root = Path(place)
    root.mkdir(parents=True, exist_ok=True)
    if (root / "lock").exists():
        raise RuntimeError(f"FUSION_STORE={place!r} is the data folder of a server: choose a folder of its own")
    own = root / f"{IDENTITY}{identity}"
    is_new = not own.exists()
    own.touch()
    if others := [path.name for path in root.glob(f"{IDENTITY}*") if path != own]:  # also one that came just now
        if is_new:
            own.unlink()
        raise other_registry(place, others[0].removeprefix(IDENTITY))


def other_registry(place: str, identity: str) -> RuntimeError:
    """The error that `place` is the registry's `identity`."""
    message = f"FUSION_STORE={place!r} belongs to another registry ({identity}): choose another place, or"
    return RuntimeError(f"{message} that registry's FUSION_DATABASE")


def copy_files(source: Path, target: Path) -> None:
    """Copy all files under `source` into the folder `target`."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            shutil.copyfile(path, place)
