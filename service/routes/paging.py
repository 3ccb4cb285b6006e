"""Lists in parts: `?limit=&after=`, as in OpenAI's lists."""

from bisect import bisect_right
from collections.abc import Iterable
from typing import Annotated

from fastapi import Query

MAX_LIMIT = 1000
Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="most entries of this part")]
After = Annotated[str, Query(max_length=128, description="`last_id` of the part before")]


def page_names(names: Iterable[str], limit: int, after: str) -> tuple[list[str], bool]:
    """Up to `limit` of the `names`, sorted, that come after `after`, and whether there are more."""
    ordered = sorted(names)
    start = bisect_right(ordered, after) if after else 0
    return ordered[start : start + limit], start + limit < len(ordered)
