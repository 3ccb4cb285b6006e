"""Who a request comes from, as its API key says: what it may do, and whose things it sees."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from starlette.types import Scope

Role = Literal["user", "deployer", "admin"]
"""Each may what the one before it may: ask; change the adapters and profiles of its tenant; everything."""
ROLES: tuple[Role, ...] = get_args(Role)
KEY = re.compile(r"lf-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")
"""An API key of the registry: its public id and its secret, 256 bits."""
OPERATOR_KEY = "vllm-"
"""Begins the ids of vLLM's own keys (`--api-key`), which follow one another; those may be short enough to guess."""
CALLER = "fusion.caller"
"""Key of a request's scope: its `Caller`."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request. The defaults are those of a server without keys, where everybody is the operator."""

    key: str = ""
    """The public id of the API key; empty without one."""
    role: Role = "admin"
    tenant: str = ""
    """Whose adapters, profiles, scorecards and limits it has besides the public ones; empty: the operator's, which are
    the public ones.
    """

    def may(self, role: Role) -> bool:
        """Whether the caller has `role`, or one above it."""
        return ROLES.index(self.role) >= ROLES.index(role)


def hide_secrets(text: str) -> str:
    """`text` without the secrets of API keys, which a client may put anywhere."""
    return KEY.sub(r"lf-\1-...", text)


def find_caller(scope: Scope) -> Caller:
    """The caller that the edge has found for a request."""
    caller: Caller = scope.get(CALLER) or Caller()
    return caller
