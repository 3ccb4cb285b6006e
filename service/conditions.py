"""Conditions of a change, `If-Match` and `If-None-Match` (RFC 9110, 13): compared where it is written, so that of two
writers at once one learns that it was late.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from service.errors import ApiError

ANY = "*"
_TAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')


@dataclass(frozen=True, slots=True)
class Condition:
    """The text of the two headers, None for one that was not sent: entity tags separated by commas, or `*`, any."""

    if_match: str | None = None
    if_none_match: str | None = None

    def check(self, tag: str | None) -> None:
        """Raise 412 unless the condition holds for the entity tag `tag`, which is None when there is nothing to change;
        400 for a header that is neither `*` nor a list of entity tags.
        """
        if self.if_match is not None and not _has(self.if_match, tag, "If-Match"):
            message = "it does not exist" if tag is None else f"its ETag is {tag} now"
            raise ApiError(412, f"If-Match does not hold: {message}; GET it and decide again.", param="If-Match")
        if self.if_none_match is not None and _has(self.if_none_match, tag, "If-None-Match"):
            message = f"If-None-Match does not hold: it exists, with the ETag {tag}; leave it, or choose another name."
            raise ApiError(412, message, param="If-None-Match")


UNCONDITIONAL = Condition()


def read_tags(text: str, header: str) -> list[str]:
    """The entity tags in a header, or `*` alone; 400 for anything else."""
    tags = [part.strip(" \t") for part in text.split(",")]
    if tags != [ANY] and not all(map(_TAG.fullmatch, tags)):
        raise ApiError(400, f'{header} is {text!r:.100}: expected entity tags such as "0a1b", or *.', param=header)
    return tags


def make_tag(parts: Iterable[object]) -> str:
    """The strong entity tag of what these parts (as JSON, whose order counts) describe."""
    return f'"{hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode()).hexdigest()[:32]}"'


def _has(text: str, tag: str | None, header: str) -> bool:
    tags = read_tags(text, header)
    if header == "If-None-Match":  # RFC 9110, 13.1.2: weakly
        tags = [one.removeprefix("W/") for one in tags]
    return tag is not None and (tags == [ANY] or tag in tags)
