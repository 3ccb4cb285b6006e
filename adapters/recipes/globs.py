"""Patterns of a recipe's schedules: `*` and `?` as in file names, matched in bounded time."""

from collections.abc import Iterable
from functools import lru_cache


def select(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that the pattern matches whole; at most len(pattern)·len(name) steps for each."""
    parts = pattern.split("*")
    return [name for name in names if _matches(parts, name)]


def _matches(parts: list[str], name: str) -> bool:
    if len(parts) == 1:
        return _equals(name, parts[0])
    first, *middle, last = parts
    at, end = len(first), len(name) - len(last)
    if at > end or not (_equals(name[:at], first) and _equals(name[end:], last)):
        return False
    for part in middle:  # each at the first place where it fits, which leaves the most for the others
        at = _find(name, part, at, end)
        if at < 0:
            return False
        at += len(part)
    return True


def _find(name: str, part: str, at: int, end: int) -> int:
    """The first offset in [at, end) of what `part` matches, -1 when there is none."""
    if "?" not in part:
        return name.find(part, at, end)
    pieces = _list_pieces(part)
    if not pieces:
        return at if at + len(part) <= end else -1
    (first, text), *others = pieces
    offset = name.find(text, at + first, end)
    while offset >= 0 and offset - first + len(part) <= end:
        start = offset - first
        if all(name.startswith(other, start + place) for place, other in others):
            return start
        offset = name.find(text, offset + 1, end)
    return -1


def _equals(text: str, part: str) -> bool:
    if "?" not in part:
        return text == part
    return len(text) == len(part) and all(text.startswith(piece, place) for place, piece in _list_pieces(part))


@lru_cache(1024)
def _list_pieces(part: str) -> tuple[tuple[int, str], ...]:
    """What stands between the `?` of a part, each with its offset."""
    pieces, at = [], 0
    for piece in part.split("?"):
        if piece:
            pieces.append((at, piece))
        at += len(piece) + 1
    return tuple(pieces)
