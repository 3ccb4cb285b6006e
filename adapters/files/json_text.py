"""JSON that strangers wrote, read in bounded time; and JSON as this package writes it."""

import codecs
import json
from collections import Counter
from collections.abc import Mapping

from adapters.errors import MAX_DIGITS, AdapterError, quote

MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
LFS_POINTER = b"version https://git-lfs"
MAX_NOTES = 3
MAX_VALUES = 2**17
"""About how many values a text may hold: a parse keeps the interpreter's lock until its end."""


def read_object(text: bytes, name: str, repeated: list[str]) -> dict[str, object]:
    """A JSON object of at most about MAX_VALUES values, as Python reads it: NaN and Infinity are numbers, and of a key
    that appears twice the last one counts; `repeated` gets such keys. AdapterError 'bad_config' otherwise.
    """
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise AdapterError("bad_config", f"{name} is too large: expected at most {MAX_VALUES} values")
    if text.startswith(LFS_POINTER):
        raise AdapterError("bad_config", f"{name} is a pointer of Git LFS, not the file: run `git lfs pull`")

    if text.startswith(MARKS):
        raise AdapterError("bad_config", f"{name} begins with a byte order mark: save it as UTF-8 without one")

    def collect(items: list[tuple[str, object]]) -> dict[str, object]:
        unique = dict(items)
        if len(unique) < len(items):
            repeated.extend(key for key, count in Counter(key for key, _ in items).items() if count > 1)
        return unique

    try:
        content = json.JSONDecoder(object_pairs_hook=collect, parse_int=_read_integer).decode(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError("bad_config", f"{name} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError("bad_config", f"{name} holds {quote(content)}: expected a JSON object")
    return content


def note_repeated(keys: list[str]) -> tuple[str, ...]:
    """Notes on keys that `read_object` has found twice."""
    return tuple(f"adapter_config.json has {quote(key)} twice; the last one counts" for key in keys[:MAX_NOTES])


def to_json(content: Mapping[str, object]) -> bytes:
    """Sorted, indented JSON with a final newline."""
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def reject_repeats(items: list[tuple[str, object]]) -> dict[str, object]:
    """The object of these members, for a `JSONDecoder`; ValueError when a key appears twice."""
    unique = dict(items)
    if len(unique) < len(items):
        ((repeated, _),) = Counter(key for key, _ in items).most_common(1)
        raise ValueError(f"the key {quote(repeated)} appears twice")
    return unique


def _read_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)
