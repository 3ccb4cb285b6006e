"""API keys: asked for on every route but the open ones."""

from starlette.datastructures import Headers
from starlette.types import Scope

from service.edge.access import METRICS_PATH
from service.edge.check import Check
from service.errors import ApiError

UNAVAILABLE = "The engine is starting or stopping; wait until /readyz returns 200."


class RequireKey(Check):
    """Answers 401 unless a request has one of the API keys.

    vLLM checks keys for some of its own routes only, and after the intake has built what a request names.
    """

    def check(self, scope: Scope) -> None:
        """Raise `ApiError` unless the request has a key, is an OPTIONS request or reads what is open."""
        access, method = self.access(), scope["method"]
        if method == "OPTIONS" or access.is_open(method, scope["path"]):
            return
        if not access.started and scope["path"] == METRICS_PATH:  # the front answers all else
            raise ApiError(503, UNAVAILABLE)
        if access.verify is not None and not access.verify(Headers(scope=scope)):
            message = "The API key is missing or wrong; expected the header 'Authorization: Bearer KEY'."
            raise ApiError(401, message, headers={"www-authenticate": "Bearer"})
