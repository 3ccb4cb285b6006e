"""A content-addressed store of folders with a byte budget. A landed folder is whole, whenever a process is killed."""

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from adapters.files.landing import atomic_folder, new_scratch_path, remove_stale

KEY_PATTERN = re.compile(r"[0-9a-f]{16,64}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One landed folder: its key, its size in bytes, when it was last used (seconds since the epoch)."""

    key: str
    bytes: int
    last_used: float


class Store:
    """Folders under `root`, one per key, written once, evicted least recently used first."""

    def __init__(self, root: str | os.PathLike[str], *, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes is {budget_bytes!r}: expected 0 or more")
        self.root = Path(root)
        self.budget_bytes = budget_bytes
        self._lock = threading.RLock()
        self.root.mkdir(parents=True, exist_ok=True)
        remove_stale(self.root)

    def land(self, key: str, write: Callable[[Path], None]) -> Path:
        """Let `write` fill an empty folder, then make it visible as `key` in one atomic rename.

        If `key` is there already, its folder is returned and nothing is written. When two threads or processes land
        one key, the second gets the first one's folder. Errors of `write` pass through and leave nothing behind.
        """
        ready = self.get(key)
        if ready is not None:
            return ready
        target = self.root / key
        try:
            with atomic_folder(target) as folder:
                write(folder)
                if not any(folder.iterdir()):
                    raise ValueError(f"nothing was written for {key!r}: expected files in its folder")
                os.utime(folder)
        except FileExistsError:  # another lander was first
            if not target.is_dir():
                raise
        return target

    def get(self, key: str) -> Path | None:
        """The folder of `key`, marked as used now, or None."""
        target = self._path(key)
        try:
            os.utime(target)
        except FileNotFoundError:
            return None
        return target

    def fetch(self, key: str) -> Path | None:
        """As `get`; a store that shares with others brings what is not here."""
        return self.get(key)

    def publish(self, key: str) -> None:
        """Show `key` to those that this store shares with: nobody."""

    def restore(self, key: str) -> bool:
        """Put another copy in the place of `key`, whose files are damaged; False when there is none."""
        return False

    def discard(self, key: str) -> None:
        """As `remove`, also where this store shares with others: `key` is damaged, and no copy is whole."""
        self.remove(key)

    def remove(self, key: str) -> None:
        """Remove `key` from view at once, then delete its files. A key that is not there is not an error."""
        scratch = new_scratch_path(self.root)  # renamed, not moved into a folder: a full disk has no room for one
        with contextlib.suppress(FileNotFoundError):
            self._path(key).rename(scratch)
            shutil.rmtree(scratch, ignore_errors=True)

    def entries(self) -> list[Entry]:
        """Every landed folder, least recently used first."""
        entries = []
        for folder in self.root.iterdir():
            if KEY_PATTERN.fullmatch(folder.name):
                with contextlib.suppress(FileNotFoundError):
                    entries.append(Entry(folder.name, _size(folder), folder.stat().st_mtime))
        return sorted(entries, key=lambda entry: (entry.last_used, entry.key))

    @property
    def nbytes(self) -> int:
        """Bytes of all landed folders."""
        return sum(entry.bytes for entry in self.entries())

    def evict(self, keep: Collection[str], need: int = 0) -> list[str]:
        """Remove folders, least recently used first and none in `keep`, until `need` more bytes fit the budget.

        Returns the removed keys. When `keep` alone is over the budget, everything else is removed.
        """
        with self._lock:
            entries = self.entries()
            excess = sum(entry.bytes for entry in entries) + need - self.budget_bytes
            removed = []
            for entry in entries:
                if excess <= 0:
                    break
                if entry.key not in keep:
                    self.remove(entry.key)
                    removed.append(entry.key)
                    excess -= entry.bytes
            return removed

    def remove_oldest(self, keep: Collection[str], count: int) -> list[str]:
        """Remove up to `count` folders, least recently used first and none in `keep`; returns their keys."""
        with self._lock:
            oldest = [entry.key for entry in self.entries() if entry.key not in keep][:count]
            for key in oldest:
                self.remove(key)
            return oldest

    def _path(self, key: str) -> Path:
        if not isinstance(key, str) or KEY_PATTERN.fullmatch(key) is None:
            raise ValueError(f"{key!r} is not a store key: expected 16 to 64 lowercase hex digits")
        return self.root / key


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
