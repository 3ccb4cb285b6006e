"""JSON that strangers wrote, read in bounded time; and JSON as this package writes it."""

import json
from collections import Counter
from collections.abc import Mapping

from adapters.errors import MAX_DIGITS, AdapterError, quote

MAX_VALUES = 2**17
"""About how many values a text may hold: a parse keeps the interpreter's lock until its end."""


def read_object(text: bytes, name: str, reason: str = "bad_config") -> dict[str, object]:
    """A JSON object of at most about MAX_VALUES values, without repeated keys, NaN or Infinity; AdapterError with
    `reason` otherwise.
    """
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise AdapterError(reason, f"{name} is too large: expected at most {MAX_VALUES} values")
    try:
        content = _decoder.decode(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(reason, f"{name} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError(reason, f"{name} holds {quote(content)}: expected a JSON object")
    return content


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


def _reject_constant(token: str) -> object:
    raise ValueError(f"{token} is not a JSON number")


def _read_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


_decoder = json.JSONDecoder(object_pairs_hook=reject_repeats, parse_constant=_reject_constant, parse_int=_read_integer)
