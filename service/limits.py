"""Limits of keys and tenants: the table `[limits]` of the policy file, and what one caller may still take.

`[limits.default]` holds for every key, `[limits.roles.ROLE]` goes before it, and `[limits.keys.ID]` before both, value
by value; `[limits.tenant]` holds for every tenant but the operator's, and `[limits.tenants.NAME]` goes before it. What
a request takes is taken from its key's limits and its tenant's, or it is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.recipes import did_you_mean
from service.callers import ROLES, Caller
from service.errors import RETRY_AFTER_S, ApiError
from service.ledger import KINDS, Hold, Kind, Ledger, OverLimitError, ShareError
from service.metrics import Metrics
from service.policy_file import LIMITS, read_policy_file
from service.quotas import Quotas
from service.registry import Registry
from service.settings import Settings, SettingsError
from service.shares import Shares

Values = Mapping[str, float]
OWNED = ("names", "bytes")
"""What a tenant has rather than uses: adapters and profiles, and the bytes of both."""
MAX_ASKS = 3
"""How often a request asks for a larger share: others may take it first."""
TABLES = ("default", "roles", "keys", "tenant", "tenants")
WORDS: Mapping[str, str] = {
    "requests": "requests a minute",
    "tokens": "tokens a minute",
    "builds": "stacks and builds a minute",
    "concurrent": "requests at once",
}


def open_limits(settings: Settings, registry: Registry, metrics: Metrics) -> "Limits":
    """The limits of a server; `SettingsError` when its policy file has a mistake."""
    shares = Shares(registry, registry.ledger) if registry.shared else None
    table = load_limits(settings.policy)
    registry.quotas = Quotas(table.find_tenant)
    metrics.used.source = registry.ledger.list_used
    return Limits(table, registry.ledger, metrics, shares)


def load_limits(path: str) -> "LimitTable":
    """The limits in the policy file at `path`; none without a file, or without the table."""
    return read_limits(read_policy_file(path).get(LIMITS, {}))


def read_limits(table: Mapping[str, Any]) -> "LimitTable":
    """The limits in `[limits]` of a policy file; `SettingsError` says where something is wrong."""
    _check_keys("limits", _read_table("limits", table), TABLES)
    keyed, owned = KINDS, (*KINDS, *OWNED)
    groups: dict[str, dict[str, Values]] = {}
    for name, kinds in (("roles", keyed), ("keys", keyed), ("tenants", owned)):
        group = _read_table(f"limits.{name}", table.get(name, {}))
        groups[name] = {key: _read_values(f"limits.{name}.{key}", values, kinds) for key, values in group.items()}
    _check_keys("limits.roles", groups["roles"], ROLES)
    default = _read_values("limits.default", table.get("default", {}), keyed)
    tenant = _read_values("limits.tenant", table.get("tenant", {}), owned)
    return LimitTable(default, groups["roles"], groups["keys"], tenant, groups["tenants"])


def _read_table(place: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SettingsError(f"FUSION_POLICY: {place!r} must be a table, got {value!r:.100}")
    return value


def _check_keys(place: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            hint = did_you_mean(key, known) or f"expected {', '.join(known)}"
            raise SettingsError(f"FUSION_POLICY: {f'{place}.{key}'!r} is not known; {hint}")


def _read_values(place: str, value: Any, kinds: tuple[str, ...]) -> Values:
    table = _read_table(place, value)
    _check_keys(place, table, kinds)
    for key, number in table.items():
        whole = isinstance(number, int) and not isinstance(number, bool) and number >= 1
        if not whole and number != math.inf:
            message = f"{f'{place}.{key}'!r} must be a whole number from 1, or inf for no limit, got {number!r:.100}"
            raise SettingsError(f"FUSION_POLICY: {message}")
    return dict(table)


@dataclass(frozen=True, slots=True)
class LimitTable:
    """The limits of all keys and tenants, by what is limited."""

    default: Values = field(default_factory=dict)
    roles: Mapping[str, Values] = field(default_factory=dict)
    keys: Mapping[str, Values] = field(default_factory=dict)
    tenant: Values = field(default_factory=dict)
    tenants: Mapping[str, Values] = field(default_factory=dict)

    def find_key(self, caller: Caller) -> Values:
        """The limits of a caller's key; none for a caller without one."""
        if not caller.key:
            return {}
        return {**self.default, **self.roles.get(caller.role, {}), **self.keys.get(caller.key, {})}

    def find_tenant(self, tenant: str) -> Values:
        """The limits of a tenant; the operator's, which has no name, has those of its own table alone."""
        return {**(self.tenant if tenant else {}), **self.tenants.get(tenant, {})}


class Limits:
    """The limits of one server, and what was used of them."""

    def __init__(self, table: LimitTable, ledger: Ledger, metrics: Metrics, shares: Shares | None = None) -> None:
        """`shares` are this replica's; None: the server is alone."""
        self.table, self.ledger, self.metrics, self.shares = table, ledger, metrics, shares

    async def watch(self) -> None:
        """Keep the shares of a replica until cancelled."""
        if self.shares is not None:
            await self.shares.run()

    def find_account(self, caller: Caller) -> "Account | None":
        """What `caller` may take; None when nothing limits it."""
        subjects = {
            f"key {caller.key}": self.table.find_key(caller),
            f"tenant {caller.tenant}": self.table.find_tenant(caller.tenant),
        }
        caps: dict[Kind, dict[str, float]] = {}
        for kind in KINDS:
            found = {subject: values[kind] for subject, values in subjects.items() if kind in values}
            if found := {subject: limit for subject, limit in found.items() if limit < math.inf}:
                caps[kind] = found
        return Account(self, caps) if caps else None

    async def count_build(self, caller: Caller) -> None:
        """Count what one change or export of `caller` makes or loads; 429 as `Account.take`."""
        if (account := self.find_account(caller)) is not None:
            (await account.take("builds")).settle(1)


@dataclass(frozen=True, slots=True)
class Account:
    """The limits of one caller: of each kind, those of its key and its tenant."""

    limits: Limits
    caps: Mapping[Kind, Mapping[str, float]]

    async def take(self, kind: Kind, amount: int = 1) -> Hold:
        """Reserve `amount` until it is settled.

        `ApiError` 429 when the limit is used up for now, 400 when it is below `amount`, 503 when replicas share it and
        the database does not answer.
        """
        for _ in range(MAX_ASKS):
            try:
                return self.limits.ledger.take(kind, self.caps.get(kind, {}), amount)
            except OverLimitError as error:
                raise self._refuse(error) from error
            except ShareError as error:
                wanted = error.wanted
            if self.limits.shares is not None:
                await self.limits.shares.ask(wanted)
        (subject, _), (limit, _) = next(iter(wanted.items()))
        raise self._refuse(OverLimitError(subject, kind, limit, amount, 0), "other replicas use what is left of it")

    def _refuse(self, error: OverLimitError, why: str = "") -> ApiError:
        who, name = error.subject.split(" ", 1)
        self.limits.metrics.record_refusal("limit")
        self.limits.metrics.limits.labels(who, error.kind).inc()
        subject = f"The API key {name!r}" if who == "key" else f"The tenant {name!r}"
        limit = f"{subject} has a limit of {error.limit:.0f} {WORDS[error.kind]}"
        if error.wait_s is None:
            message = f"{limit}, and this request alone may take {error.amount}: ask for fewer."
            return ApiError(400, message)
        wait_s = error.wait_s or RETRY_AFTER_S
        need = f"this request, which may take {error.amount}," if error.amount > 1 else "this request"
        passes = f"try again in {wait_s} s" if error.wait_s or why else "try again when one of its requests has ended"
        message = f"{limit}; {why or f'{need} would exceed it now'}: {passes}."
        return ApiError(429, message, headers={"retry-after": str(wait_s)})

    def headers(self) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*` headers, of the limit with the least left."""
        headers = {}
        for kind in ("requests", "tokens"):
            if (standing := self.limits.ledger.look(kind, self.caps.get(kind, {}))) is not None:
                headers[f"x-ratelimit-limit-{kind}"] = f"{standing.limit:.0f}"
                headers[f"x-ratelimit-remaining-{kind}"] = str(standing.remaining)
                headers[f"x-ratelimit-reset-{kind}"] = f"{standing.reset_s}s"
        return headers
