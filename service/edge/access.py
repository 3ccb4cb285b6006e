"""Who may send requests: what the settings and vLLM's flags say, and what may be read without a key."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from starlette.datastructures import Headers

from service.callers import Caller
from service.settings import Settings

BENTOML_PATHS = ("/livez", "/readyz", "/healthz", "/metrics")
"""What BentoML answers itself; its other routes are removed."""
METRICS_PATH = "/metrics"
OPEN_PATHS = ("/", "/livez", "/readyz", "/healthz", "/health", "/ping", "/docs", "/openapi.json")
"""What anyone may read, with all below OPEN_FOLDERS: the page, health checks and the API's description."""
ASSETS_PATH = "/docs/assets"
OPEN_FOLDERS = (f"{ASSETS_PATH}/", "/page/")


@dataclass(frozen=True, slots=True)
class Access:
    """What a server asks of a request. The defaults are those of a server whose engine has not started."""

    started: bool = False
    hosts: frozenset[str] | None = None
    """Names that `Host` may have besides IP addresses, in lower case; None: any."""
    identify: Callable[[Headers], Caller | None] = lambda headers: Caller()
    """Who sends a request with these headers: None for a missing or wrong API key."""
    keyless: bool = True
    """Whether a server without any key answers on other addresses than loopback."""
    cors: Mapping[str, Any] = field(default_factory=dict)
    """Options of Starlette's `CORSMiddleware`, from vLLM's flags."""
    public_metrics: bool = False

    def is_open(self, method: str, path: str) -> bool:
        """Whether anyone may make this request, without a key and from any web page."""
        if method not in ("GET", "HEAD"):  # a POST would reach the intake
            return False
        return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS) or (self.public_metrics and path == METRICS_PATH)


def allowed_hosts(settings: Settings) -> frozenset[str] | None:
    """The names that `Host` may have, None for any: see `FUSION_ALLOWED_HOSTS`."""
    names = [name.lower().removesuffix(".") for name in settings.allowed_hosts]
    if "*" in names or (not names and not is_loopback(settings.host)):
        return None
    return frozenset({"localhost", settings.host.lower(), *names})


def is_loopback(host: str) -> bool:
    """Whether an address, or the name `localhost`, is one of this machine alone."""
    try:
        address = ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return host.lower() == "localhost"
