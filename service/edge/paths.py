"""Paths that no route has, and that some routers do not even match: those with control characters, and `*`."""

from starlette.types import Scope

from service.edge.check import Check
from service.errors import ApiError

MAX_PATH = 16384
"""Characters: twice the longest recipe, which a path may name."""


class Paths(Check):
    """Answers 404 to paths that no route can have, 414 to very long ones."""

    def check(self, scope: Scope) -> None:
        """Raise `ApiError` when the path cannot be one of a route."""
        path = scope["path"]
        if len(path) > MAX_PATH:
            raise ApiError(414, f"The path has {len(path)} characters; expected at most {MAX_PATH}.")
        if not path.isprintable() or not path.startswith("/"):
            raise ApiError(404, f"No route has the path {path[:100]!r}; /docs lists all routes.")
