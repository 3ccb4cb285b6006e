"""What Ray reads from the environment while it is imported, so before that."""

import os
import secrets
from importlib import import_module
from typing import Any

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
TOKENS = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}


def prepare_ray(is_alone: bool) -> None:
    """Send no usage reports; let a cluster that starts here listen on the loopback address, and have a token.

    Whoever reaches Ray's ports and has its token may run code.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not is_alone:
        return
    os.environ[LOOPBACK] = "0"  # there Ray stays on loopback, and with this on Linux, too
    if not os.environ.keys() & TOKENS:
        # Turns authentication on; else Ray writes a token into the home directory, which a container may not have.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def keep_on_loopback() -> None:
    """In a process of such a cluster: Serve's replicas listen there, too, instead of on all interfaces."""
    if os.environ.get(LOOPBACK) != "0":
        return
    replica: Any = import_module("ray.serve._private.replica")
    if (add_port := getattr(replica, "add_port_to_grpc_server", None)) is None:
        raise RuntimeError("this Ray's replicas listen otherwise than Ray 2.60's: install the pin of the extra `ray`")
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", "127.0.0.1"))
