"""Rows of a table: by the names in its header, and those that are none, or that a stray quote has joined."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SHOWN = 3
"""How many places a note names."""
_RULE = re.compile(r"\s*:?-*:?\s*")
"""A field of the line below the header of a table in Markdown."""
_ABSENT = ("nan", "NaN", "<NA>", "#N/A")
"""What programs write for a field that has no value."""


@dataclass(frozen=True, slots=True)
class Broken:
    """Stands for a row that cannot be parsed."""

    reason: str


def name_columns(header: Sequence[str]) -> list[str]:
    """The header without spaces around the names; a repeated name gets a number."""
    repeats: Counter[str] = Counter()
    names = []
    for name in map(str.strip, header):
        names.append(f"{name}.{repeats[name]}" if repeats[name] else name)
        repeats[name] += 1
    return names


def join_row(header: Sequence[str], fields: Sequence[str]) -> Any:
    """The row of these fields by column, or Broken."""
    if [field.strip() for field in fields] == list(header):
        return Broken("is the header again")
    if any("--" in field for field in fields) and all(_RULE.fullmatch(field) for field in fields):
        return Broken("is the rule of a Markdown table")
    if len(fields) < len(header) or any(fields[len(header) :]):
        return Broken(f"does not have as many fields as the header: {len(fields)} instead of {len(header)}")
    return {name: None if field in _ABSENT else field for name, field in zip(header, fields, strict=False)}


def record(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    """The lines, each also added to `taken`."""
    for line in lines:
        taken.append(line)
        yield line


def look_like_rows(lines: Sequence[str], delimiter: str, width: int, *, spaced: bool) -> bool:
    """Whether a stray quote may have joined these lines to one row, opening a field that another closes before a comma
    lines later: whether each would be a row of `width` fields without the only pair of quotes. Prose would not: it has
    spaces after commas, and seldom as many in every line.
    """
    text = "".join(lines)
    first, last = text.find('"'), text.rfind('"')
    if width < 2 or text.count('"') != 2 or text[last + 1 : last + 2] != delimiter or text[last - 1] == "\n":
        return False
    rows = [line.strip().split(delimiter) for line in lines]
    return first < last and all(
        len(row) == width and all(one and (spaced or not one[0].isspace()) for one in row) for row in rows
    )


def note_joined(places: Sequence[str]) -> list[str]:
    """The note on rows that look joined, none where there are none; `places` are lines, "3 to 5"."""
    if not places:
        return []
    shown = ", ".join([*places[:SHOWN], *[f"and {len(places) - SHOWN} more"] * (len(places) > SHOWN)])
    return [
        f"lines {shown} are one row for the quotes around them, and look like rows of their own: if so, double the "
        "quotes inside fields"
    ]
