"""Names of tenants' things: the registry keeps `tenant|name`, and of the public ones the plain name."""

import re

from service.callers import Caller
from service.tables import MAX_TENANT

SEPARATOR = "|"
"""In no valid name and in no tenant's."""
TENANT_PATTERN = rf"[a-z0-9][a-z0-9._-]{{0,{MAX_TENANT - 1}}}"


def join_key(tenant: str, name: str) -> str:
    """The registered name of what a tenant calls `name`; of public things, whose tenant is "", that is the name itself.

    A name that contains the separator is invalid. Its registered name then begins with the separator, as no registered
    thing's does: taken as it is, `acme|own` would let anybody name the adapter `own` of the tenant `acme`.
    """
    return f"{tenant}{SEPARATOR}{name}" if tenant or SEPARATOR in name else name


def split_key(key: str) -> tuple[str, str]:
    """The tenant, "" for what is public, and the name in a registered name."""
    tenant, separator, name = key.partition(SEPARATOR)
    return (tenant, name) if separator else ("", key)


def is_operator(caller: Caller) -> bool:
    """Whether the caller may see and change the things of every tenant."""
    return not caller.tenant and caller.may("admin")


def may_change(caller: Caller, tenant: str) -> bool:
    """Whether the caller may change the tenant's things, and so sees all of them."""
    return is_operator(caller) or (caller.tenant == tenant and caller.may("deployer"))


def check_tenant(tenant: str) -> str:
    """Return `tenant` if a tenant, or "" for the operator, may be called that; ValueError otherwise."""
    if tenant and re.fullmatch(TENANT_PATTERN, tenant) is None:
        expected = f"at most {MAX_TENANT} lower-case letters, digits, '.', '_' or '-', a letter or digit first"
        raise ValueError(f"{tenant!r:.100} is not a tenant's name: expected {expected}")
    return tenant
