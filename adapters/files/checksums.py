"""Checksums of a folder's files, in the folder: whether they are still what was written."""

import errno
import hashlib
import json
from pathlib import Path

CHECKSUMS = "checksums.json"
BUSY = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that say nothing about the files."""


def write_checksums(folder: Path) -> None:
    """Write the sha256 of every file under `folder` to its CHECKSUMS."""
    (folder / CHECKSUMS).write_text(json.dumps(_hash_files(folder), indent=1))


def is_whole(folder: Path, *, unread: str = "") -> bool:
    """Whether the files under `folder` are those that `write_checksums` saw, to the last bit, and no others.

    Files of the name `unread` need only be there. False when they cannot be read; OSError when the process has no
    memory or file left to read them with.
    """
    try:
        written = json.loads((folder / CHECKSUMS).read_bytes())
        found = _hash_files(folder, unread)
        return found.keys() == written.keys() and all(found[name] in ("", written[name]) for name in found)
    except (OSError, ValueError, AttributeError) as error:
        if getattr(error, "errno", None) in BUSY:
            raise
        return False


def _hash_files(folder: Path, unread: str = "") -> dict[str, str]:
    """sha256 by path; empty for those that are not read."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / CHECKSUMS:
            sums[str(path.relative_to(folder))] = "" if path.name == unread else _hash(path)
    return sums


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
