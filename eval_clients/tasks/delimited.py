"""Delimited text read as a table: separator and header are found by consistency over all rows, never assumed.

A file is a table only if its rows agree; text with commas in it, one prompt a line, stays whole. Where a header and a
prompt, or a separator and a sign of the prose, cannot be told apart, the file is refused: a header would be asked, or
a target sent along with its prompt.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "'|'", ",": "commas"}
"""By name, the least frequent in prose first."""
LINES = ""
"""The separator of a file without columns: one value a line."""
EXCEL = re.compile(r"sep=[^\w\s]?\t?\r?\n")
"""The line that tells Excel the separator."""
LATE_HEADER = 10
"""So many lines at the start are searched for a header."""
MIN_AGREED = 3
"""So many lines with the same number of spaced commas are a table; fewer agree by chance."""


class AmbiguousError(Exception):
    """A file that could be read in two ways; the message says which, without the file's name."""


@dataclass(frozen=True, slots=True)
class Line:
    """The cells of one record, and the line it begins in (from 1)."""

    number: int
    cells: Sequence[str]
    strange: bool = False
    """Whether a quote begins a cell without enclosing it, so that it was read as part of the text."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The records of a file that are not blank, under one separator. `header` are the first one's cells, or empty."""

    separator: str
    header: Sequence[str]
    lines: Sequence[Line]
    notes: Sequence[str] = ()


def normalize_name(name: str) -> str:
    """A column's name as names are compared: `Context_String`, `context string` and `ContextString` are one."""
    return "".join(character for character in name.casefold() if character.isalnum())


def split_lines(text: str, separator: str) -> list[Line]:
    """The records that are not blank. Quotes are RFC 4180's or backslash-escaped ones; a quote that does not enclose
    its cell is part of the text.
    """
    stop = re.escape(separator) + r"\r\n"
    blank = "" if separator == LINES else "[ ]*+"
    end = rf"(?=[{stop}]|\Z)"
    quoted = re.compile(rf'{blank}"((?:[^"]++|"")*+)"[ ]*+{end}')
    escaped = re.compile(rf'{blank}"((?:[^"\\]++|\\.)*+)"[ ]*+{end}', re.DOTALL)
    plain = re.compile(rf"[^{stop}]*+")
    newline = re.compile(r"\r\n|\n|\r")
    lines: list[Line] = []
    cells: list[str] = []
    strange, number, first, position = False, 1, 1, 0
    while True:
        if match := quoted.match(text, position):
            cells.append(match[1].replace('""', '"'))
        elif match := escaped.match(text, position):
            cells.append(re.sub(r"\\(.)", r"\1", match[1], flags=re.DOTALL))
        else:
            match = plain.match(text, position)
            assert match is not None
            cells.append(match[0])
            strange |= match[0].startswith('"')
        number += len(newline.findall(match[0]))
        position = match.end()
        if separator and text.startswith(separator, position):
            position += 1
            continue
        if any(cell.strip() for cell in cells):
            lines.append(Line(first, tuple(cells), strange))
        if not (match := newline.match(text, position)):
            return lines
        position, number, cells, strange = match.end(), number + 1, [], False
        first = number


def split_table(text: str, known: Sequence[Collection[str]], given: Collection[str] = (), prose: bool = False) -> Grid:
    """The file as a table, or as lines. A header is a first line with a column the user named (`given`), else with one
    of the first of the `known` sets that matches any; all are normalized. `prose` says that a comma between words is
    usual, as in a `.txt`. AmbiguousError when it cannot be told.
    """
    if match := EXCEL.match(text):
        text = "\n" + text[match.end() :]  # keeps the lines' numbers
    grids = {sign: split_lines(text, sign) for sign in SEPARATORS if sign in text}
    lines = split_lines(text, LINES)
    if not lines:
        raise AmbiguousError("it has no rows; expected at least one prompt")
    for names in (given, *known):
        headers = {sign: _match_header(grid[0], names) for sign, grid in grids.items() if len(grid[0].cells) > 1}
        sign = max(headers, key=lambda sign: headers[sign], default=LINES)
        if headers.get(sign):
            _check_separator(sign, grids)
            return _cut_header(sign, grids[sign])
        if _match_header(lines[0], names):
            _check_single(grids, lines)
            rows, notes = _drop_repeats(lines[0].cells, lines[1:])
            return Grid(LINES, _strip(lines[0].cells), rows, notes + _describe_quotes(rows))
    _check_late_header([lines, *grids.values()], known[0] if known else ())
    return _split_bare(grids, lines, prose)


def _strip(cells: Sequence[str]) -> list[str]:
    """Cells without surrounding space, and without the empty ones at the end."""
    stripped = [cell.strip() for cell in cells]
    while len(stripped) > 1 and not stripped[-1]:
        stripped.pop()
    return stripped


def _match_header(line: Line, names: Collection[str]) -> int:
    """How many names are among the cells of a line that may be a header; 0 when it is none."""
    cells = [cell.strip() for cell in line.cells]
    if any(len(cell) > 60 or "\n" in cell for cell in cells):
        return 0
    return sum(normalize_name(cell) in names for cell in cells)


def _drop_repeats(header: Sequence[str], lines: Sequence[Line]) -> tuple[list[Line], list[str]]:
    """The lines that do not repeat the header, as joined files do, and a sentence about those that do."""
    names = _strip(header)
    rows = [line for line in lines if _strip(line.cells) != names]
    count = len(lines) - len(rows)
    return rows, [f"{count} repeated header{'s' * (count > 1)} left out"] if count else []


def _check_late_header(grids: Sequence[Sequence[Line]], names: Collection[str]) -> None:
    """AmbiguousError when one of the first lines but not the very first is a header."""
    for grid in grids:
        for line in grid[1:LATE_HEADER]:
            if _match_header(line, names) and (len(line.cells) > 1 or len(line.cells[0].split()) == 1):
                raise AmbiguousError(
                    f"line {line.number} looks like the header, but line {grid[0].number} stands above it: remove what "
                    "stands above the header"
                )


def _cut_header(separator: str, lines: Sequence[Line]) -> Grid:
    """The grid under its header. Cells missing at the end are empty; AmbiguousError for more cells than names."""
    header = _strip(lines[0].cells)
    lines, notes = _drop_repeats(header, lines[1:])
    is_wider = lines and all(len(line.cells) == len(header) + 1 for line in lines)
    if is_wider and any(line.cells[-1].strip() for line in lines) and is_index(lines):
        header = ["", *header]  # R's write.table leaves the name of its index out
    rows = []
    for line in lines:
        if separator == "|" and all(re.fullmatch(r"\s*:?-*:?\s*", cell) for cell in line.cells):
            raise AmbiguousError(f"line {line.number} is the rule of a Markdown table; save the table as CSV")
        cells = list(line.cells)
        while len(cells) > len(header) and not cells[-1].strip():
            cells.pop()
        if len(cells) > len(header):
            raise AmbiguousError(
                f"line {line.number} has {len(cells)} cells, and the header {len(header)}: a cell that holds "
                f"{separator!r} must stand in double quotes"
            )
        rows.append(Line(line.number, cells + [""] * (len(header) - len(cells)), line.strange))
    spaced = [line.number for line in lines if any(cell[:1] == " " and cell.strip() for cell in line.cells[1:])]
    if separator == "," and 0 < len(spaced) < len(lines):
        notes.append(f"{_count(spaced)}: a cell begins with a space; a prompt that holds commas must stand in quotes")
    return Grid(separator, header, rows, notes + _describe_quotes(rows))


def is_index(lines: Sequence[Line], column: int = 0) -> bool:
    """Whether the cells of a column count up by one."""
    cells = [line.cells[column].strip() for line in lines]
    if not cells or not all(cell.isdecimal() and len(cell) < 10 for cell in cells):
        return False
    return [int(cell) for cell in cells] == list(range(int(cells[0]), int(cells[0]) + len(cells)))


def _check_separator(sign: str, grids: dict[str, list[Line]]) -> None:
    """AmbiguousError when no row has a second cell, and all have one under another separator than the header's."""
    rows = grids[sign][1:]
    others = [
        other for other, grid in grids.items() if len(grid) > 1 and all(_is_split(row, other) for row in grid[1:])
    ]
    if rows and others and all(len(row.cells) == 1 for row in rows):
        raise AmbiguousError(
            f"the header is split by {SEPARATORS[sign]}, and line {rows[0].number} by {SEPARATORS[others[0]]}: use one "
            "separator"
        )


def _check_single(grids: dict[str, list[Line]], lines: Sequence[Line]) -> None:
    """AmbiguousError when all lines under a header of one name look as if they had more columns."""
    for sign, grid in grids.items():
        if len(grid) > 1 and all(_is_split(line, sign) for line in grid[1:]):
            raise AmbiguousError(
                f"the header names one column, {lines[0].cells[0].strip()!r}, and line {grid[1].number} has "
                f"{len(grid[1].cells)} cells split by {SEPARATORS[sign]}: name all columns in the header, or put the "
                "prompts in double quotes"
            )


def _is_split(line: Line, sign: str) -> bool:
    """Whether a sign in a line looks like a separator, not like one of prose (which a space or digits follow)."""
    for left, right in pairwise(line.cells):
        number = sign == "," and left[-1:].isdigit() and right[:3].isdigit()
        if right.strip() and (sign in "\t|" or not (right[0].isspace() or number)):
            return True
    return False


def _split_bare(grids: dict[str, list[Line]], lines: list[Line], prose: bool) -> Grid:
    """A file without a header of known names: a table if all lines agree, else one value a line."""
    for sign, grid in grids.items():
        counts = {len(_strip(line.cells)) for line in grid}
        split = [line for line in grid if _is_split(line, sign)]
        agreed = len(counts) == 1 and counts != {1}
        many = len(grid) >= (2 if sign == ";" else MIN_AGREED) and not (prose and sign == ",")
        if agreed and (len(split) == len(grid) or many):
            return Grid(sign, (), grid, _describe_quotes(grid))
        if len(split) == len(grid) and len(counts) > 1 and not (prose and sign == ","):
            odd = next(line for line in grid if len(_strip(line.cells)) != len(_strip(grid[0].cells)))
            raise AmbiguousError(
                f"its lines look split by {SEPARATORS[sign]}, and line {odd.number} has "
                f"{len(_strip(odd.cells))} cells where line {grid[0].number} has {len(_strip(grid[0].cells))}: put "
                f"cells that hold {sign!r} in double quotes"
            )
    return Grid(LINES, (), lines, _describe_quotes(lines))


def looks_like_header(first: str, others: Sequence[str], vocabulary: Collection[str]) -> bool:
    """Whether the first value of a single column may be its name or a comment: a word where the others are sentences,
    or two or three, one of them of the `vocabulary` or half as many as any other value has.
    """
    words = first.split()
    if first.startswith("#"):
        return not all(other.startswith("#") for other in others)
    if not words or first.rstrip()[-1] in ".?!;\"'" or len(words) > 3:
        return False
    least = min((len(other.split()) for other in others), default=0)
    if len(words) == 1:
        return least > 1 or not others
    known = any(part in vocabulary for part in re.split(r"[\W_]+", first.casefold()))
    return least >= 2 * len(words) or (known and least > len(words))


def _describe_quotes(lines: Sequence[Line]) -> list[str]:
    """Sentences about records whose quotes are unusual, with the first one's line."""
    notes = []
    strange = [line.number for line in lines if line.strange]
    if strange:
        notes.append(f"{_count(strange)}: a quote begins a cell but does not enclose it, and is read as text")
    long = [line.number for line in lines if any("\n" in cell or "\r" in cell for cell in line.cells)]
    if long:
        notes.append(f"{_count(long)}: a quoted cell has several lines")
    return notes


def _count(numbers: Sequence[int]) -> str:
    return f"line {numbers[0]}" + (f" and {len(numbers) - 1} more" if len(numbers) > 1 else "")
