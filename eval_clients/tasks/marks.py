"""Marks in prompts that are not part of them: numbers and bullets of a list, and placeholders left unfilled."""

import re
from collections import Counter
from collections.abc import Sequence

NUMBER = re.compile(r"\s*(\d{1,6})[.)]\s+(?=\S)")
BULLET = re.compile(r"\s*([-*•])\s+(?=\S)")
PLACE = re.compile(r"\{\{?[A-Za-z_ ]{1,40}\}?\}|\[(?:INSERT|REPLACE|YOUR)\b[^\]]{0,60}\]", re.IGNORECASE)


def strip_marks(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """The lines of a list without its numbers, which count up, or its bullets, and a sentence about that; other lines
    as they are.
    """
    if len(lines) > 1:
        numbers = [NUMBER.match(line) for line in lines]
        counted = [int(match[1]) for match in numbers if match]
        if counted in ([*range(len(lines))], [*range(1, len(lines) + 1)]):
            return [NUMBER.sub("", line, count=1) for line in lines], ["the numbers before the prompts are left out"]
        bullets = [BULLET.match(line) for line in lines]
        if all(bullets) and len({match[1] for match in bullets if match}) == 1:
            return [BULLET.sub("", line, count=1) for line in lines], ["the bullets before the prompts are left out"]
    return list(lines), []


def note_prompts(prompts: Sequence[str]) -> list[str]:
    """Sentences about prompts that are there more than once, or contain an unfilled placeholder."""
    notes = []
    repeated = sum(count - 1 for count in Counter(prompts).values())
    if repeated:
        notes.append(f"duplicates, asked again: {repeated}")
    places = [match[0] for prompt in prompts if (match := PLACE.search(prompt))]
    if places:
        notes.append(f"prompts with an unfilled placeholder such as {places[0]!r}: {len(places)}")
    return notes
