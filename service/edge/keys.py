"""API keys: asked for on every route but the open ones; the request's caller is known from here on."""

import logging
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Scope

from service.callers import CALLER, OPERATOR_KEY, Caller
from service.edge.access import METRICS_PATH, Access, is_loopback
from service.edge.check import Check
from service.edge.clients import client_name
from service.edge.guesses import MAX_GUESSES, Guesses
from service.errors import ApiError

log = logging.getLogger("fusion")

UNAVAILABLE = "The engine is starting or stopping; wait until /readyz returns 200."
STRANGER = Caller(role="user")
"""Whoever reads what is open."""


class RequireKey(Check):
    """Answers 401 unless a request has one of the API keys, 429 to a client that goes on with wrong ones.

    vLLM checks keys for some of its own routes only, and after the intake has built what a request names.
    """

    def __init__(self, app: ASGIApp, access: Callable[[], Access] = Access) -> None:
        super().__init__(app, access)
        self._guesses = Guesses()

    def check(self, scope: Scope) -> None:
        """Say who sends the request; `ApiError` unless it has a key, is an OPTIONS request or reads what is open."""
        access, method, path = self.access(), scope["method"], scope["path"]
        scope[CALLER] = STRANGER
        if method == "OPTIONS" or access.is_open(method, path):
            return
        if not access.started and path == METRICS_PATH:  # the front answers all else
            raise ApiError(503, UNAVAILABLE)
        scope[CALLER] = caller = self._identify(scope, access)
        if path == METRICS_PATH and not caller.may("admin"):
            raise ApiError(403, f"{METRICS_PATH} needs the role 'admin', the key {caller.key} has {caller.role!r}.")
        if path == METRICS_PATH and caller.tenant:  # series are named by the profiles of all tenants
            raise ApiError(403, f"{METRICS_PATH} is for the operator's admins, the key {caller.key} is a tenant's.")

    def _identify(self, scope: Scope, access: Access) -> Caller:
        headers, client = Headers(scope=scope), client_name(scope)
        caller, wait_s = access.identify(headers), self._guesses.wait_s(client)
        # A secret of the registry's cannot be guessed: whoever has it is let in beside those who try.
        if wait_s and (caller is None or caller.key.startswith(OPERATOR_KEY)):
            message = (
                f"This client sent {MAX_GUESSES} wrong API keys within a minute; no more are looked at for {wait_s} s."
            )
            raise ApiError(429, message, headers={"retry-after": str(wait_s)})
        if caller is None:
            if "authorization" in headers or "x-api-key" in headers:
                self._guesses.count(client)
                if self._guesses.wait_s(client):
                    log.warning("client %s sent %d wrong API keys within a minute", client, MAX_GUESSES)
            message = "The API key is missing or wrong; expected the header 'Authorization: Bearer KEY'."
            raise ApiError(401, message, headers={"www-authenticate": "Bearer"})
        if not caller.key and not access.keyless and not is_loopback((scope.get("server") or ("::1",))[0]):
            message = "This server has no API key yet, so it answers on loopback addresses alone"
            raise ApiError(403, f"{message}: make a key with `lora-fusion keys create --role admin`.")
        return caller
