"""Requests in progress: how many there may be, and what share of them one client may hold."""

from collections import Counter
from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address, ip_network

from starlette.types import ASGIApp, Receive, Scope, Send

from service.callers import find_caller
from service.errors import ApiError, error_response

MAX_NAME = 64
"""Characters of a client's name, of which some are remembered."""
DRAIN = "fusion.drain"
"""Key of a request's scope: waits until the client has read most of what was answered; uvicorn's flow control."""
READS = ("GET", "HEAD")


def client_network(address: str) -> str:
    """What counts as one client: an IPv4 address, the network of an IPv6 address, whole for one host, or a name, which
    is no tenant's and no key's.
    """
    try:
        host = ip_address(address.partition("%")[0])
    except ValueError:  # a proxy's header may hold anything
        return f"name {address}"[:MAX_NAME]
    if isinstance(host, IPv6Address):
        return str(host.ipv4_mapped or ip_network((int(host) >> 64 << 64, 64)))
    return str(host)


def client_name(scope: Scope) -> str:
    """The client of a request, as `client_network` has it; all clients of a Unix socket are one."""
    return client_network(scope["client"][0]) if scope.get("client") else ""


def sender_name(scope: Scope) -> str:
    """Who sends a request whose key has been looked at: its tenant, or else its client. Behind a gateway all clients
    have its address.
    """
    tenant = find_caller(scope).tenant
    return f"tenant {tenant}" if tenant else client_name(scope)


async def wait_for_reader(scope: Scope) -> None:
    """Wait until the client has read its answer, which is in memory until then, or is cut off."""
    if DRAIN in scope:
        await scope[DRAIN]()


class Shares:
    """`limit` places for all clients together; one client may hold three quarters of them."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._share = -(-3 * limit // 4)
        self._used: Counter[str] = Counter()

    def take(self, client: str) -> bool:
        """Give `client` a place if one is left for it."""
        if not self._free or self._used[client] >= self._share:
            return False
        self._free -= 1
        self._used[client] += 1
        return True

    def free(self, client: str) -> None:
        """Take a place back."""
        self._free += 1
        self._used[client] -= 1
        if not self._used[client]:
            del self._used[client]


class LimitRequests:
    """ASGI middleware that answers 429 when `max_requests` are in progress, reads of the `exempt` paths left out.

    Behind `LimitBodies` a request counts from when its body is whole: slow senders take no place.
    """

    def __init__(self, app: ASGIApp, *, exempt: Sequence[str], max_requests: int) -> None:
        self.app = app
        self._exempt = frozenset(exempt)
        self._shares = Shares(max_requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on while it has a place."""
        if scope["type"] != "http" or (scope["path"] in self._exempt and scope["method"] in READS):
            await self.app(scope, receive, send)
            return
        client = sender_name(scope)
        if not self._shares.take(client):
            message = "Too many requests are in progress (FUSION_MAX_REQUESTS); try again."
            await error_response(ApiError(429, message))(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
            await wait_for_reader(scope)
        finally:
            self._shares.free(client)
