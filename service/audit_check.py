"""The check of an audit: whether its entries are whole, in order, and as they were written."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from service.audit import NO_HASH, hash_text, write_canonical


class BrokenChainError(ValueError):
    """An entry was changed, removed or moved; the message says where."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was found whole: the ids of the first and last entry, and the last one's hash, the head."""

    first: int
    last: int
    head: str


def read_lines(lines: Iterable[str], where: str) -> dict[int, dict[str, Any]]:
    """The entries of a file by id, each of them as it should be; BrokenChainError when they are not in order."""
    entries: dict[int, dict[str, Any]] = {}
    last = 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            id_ = int(row["id"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BrokenChainError(f"{where}, line {number}: not an audit entry") from error
        if id_ <= last:
            raise BrokenChainError(f"{where}, line {number}: entry {id_} comes after entry {last}")
        entries[id_], last = row, id_
    return entries


def merge(parts: Iterable[Mapping[int, dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    """The entries of several files together; BrokenChainError when two differ about one."""
    entries: dict[int, dict[str, Any]] = {}
    for part in parts:
        for id_, row in part.items():
            if entries.setdefault(id_, row) != row:
                raise BrokenChainError(f"entry {id_} is not the same in all files")
    return entries


def check_chain(
    entries: Mapping[int, Mapping[str, Any]], *, start: str | None = None, head: str | None = None
) -> Report:
    """Raise BrokenChainError unless each entry has its hash and follows the one before; `start` is the hash before the
    first entry, when that is not the very first one; one with the hash `head` must be among them.
    """
    if not entries:
        raise BrokenChainError("the audit has no entries")
    numbers = sorted(entries)
    previous, expected = (start, numbers[0]) if start else (NO_HASH, 1)
    for number in numbers:
        if number != expected:
            missing = f"{expected}" if number == expected + 1 else f"{expected} to {number - 1}"
            raise BrokenChainError(f"entry {missing} is missing")
        row = entries[number]
        body = row.get("entry")
        if (
            not isinstance(body, dict)
            or body.get("id") != number
            or hash_text(write_canonical(body)) != row.get("hash")
        ):
            raise BrokenChainError(f"entry {number} was changed: it does not have its hash")
        if body.get("previous") != previous:
            raise BrokenChainError(f"entry {number} does not follow the one before it, which was changed or removed")
        previous, expected = str(row["hash"]), number + 1
    if head is not None and head not in {row["hash"] for row in entries.values()}:
        raise BrokenChainError(f"no entry has the hash {head[:64]!r}: the end was cut off, or all was written anew")
    return Report(numbers[0], numbers[-1], previous)
