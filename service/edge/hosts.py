"""Which names a request may call this server by.

DNS rebinding gives a web page's own name the address of this server, which makes the page same-origin to the
browser; only the name in `Host` still tells.
"""

import re
from functools import lru_cache
from ipaddress import ip_address

from starlette.types import Scope

from service.edge.check import Check, header_values
from service.errors import ApiError
from service.validation import MAX_QUOTED

AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]{2,45})\]|([a-z0-9._-]{1,255}))(?::[0-9]{0,5})?")


class Hosts(Check):
    """Answers 421 to requests for another host than the access allows, 400 without one good `Host`."""

    def check(self, scope: Scope) -> None:
        """Raise `ApiError` unless the request names an allowed host."""
        values = header_values(scope, b"host")
        if not values and scope.get("http_version") == "1.0":
            return  # it need not have one, and no browser speaks it
        host = read_host(values[0]) if len(values) == 1 else None
        if host is None:
            raise ApiError(400, "The request must have one valid Host header: a name or an address, and a port.")
        name, is_address = host
        hosts = self.access().hosts
        if hosts is not None and not is_address and name not in hosts:
            message = f"The host {name[:MAX_QUOTED]!r} is not allowed; to serve it, add it to FUSION_ALLOWED_HOSTS."
            raise ApiError(421, message)


@lru_cache(maxsize=256)
def read_host(value: bytes) -> tuple[str, bool] | None:
    """Name of a `Host` (lower case, without port and final dot) and whether it is an IP address; None: malformed."""
    match = AUTHORITY.fullmatch(value.decode("latin-1").lower())
    if match is None:
        return None
    name = match[1] or match[2].removesuffix(".")
    try:
        address = ip_address(name)
    except ValueError:
        return None if match[1] or not name else (name, False)
    return (name, True) if (address.version == 6) == bool(match[1]) else None
