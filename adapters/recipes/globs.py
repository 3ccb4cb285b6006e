"""Patterns of a recipe's schedules: `*` and `?` as in file names, matched in bounded time and without a cache that
strangers could fill.
"""


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern matches the whole name; at most len(pattern)·len(name) steps."""
    first, *rest = pattern.split("*")
    if not rest:
        return _equals(name, first)
    *middle, last = rest
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
    offsets = range(at, end - len(part) + 1)
    return next((offset for offset in offsets if _equals(name[offset : offset + len(part)], part)), -1)


def _equals(text: str, part: str) -> bool:
    if "?" not in part:
        return text == part
    return len(text) == len(part) and all(sign in ("?", letter) for sign, letter in zip(part, text, strict=True))
