"""What tenants own, within their limits: names of adapters and profiles, and the bytes of these and of scorecards."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain

from service.errors import ApiError
from service.records import AdapterRecord
from service.snapshot import ROW_BYTES, Snapshot
from service.tenants import split_key

Values = Mapping[str, float]


class Quotas:
    """The limits of what each tenant owns; checked in the change that adds it, so that they hold for all replicas."""

    def __init__(self, find_limits: Callable[[str], Values] = lambda tenant: {}) -> None:
        self._find_limits = find_limits

    def check_adapter(self, snapshot: Snapshot, record: AdapterRecord) -> None:
        """Raise 409 when this adapter would be too much for its tenant."""
        own = _list_adapters(snapshot, record.tenant)
        added = _add_up(snapshot, record.tenant, {**own, record.key: record}) - _add_up(snapshot, record.tenant, own)
        known = own.keys() | snapshot.damaged_adapters.keys()
        self._check(snapshot, record.tenant, added, is_new=record.key not in known)

    def check_version(self, snapshot: Snapshot, key: str, nbytes: int) -> None:
        """The same of a version of the profile with the registered name `key`."""
        known = snapshot.profiles.keys() | snapshot.damaged_profiles.keys()
        self._check(snapshot, split_key(key)[0], nbytes, is_new=key not in known)

    def check_scorecard(self, snapshot: Snapshot, tenant: str, nbytes: int) -> None:
        """The same of a scorecard."""
        self._check(snapshot, tenant, nbytes, is_new=False)

    def _check(self, snapshot: Snapshot, tenant: str, nbytes: int, *, is_new: bool) -> None:
        limits = self._find_limits(tenant)
        used = {"names": 0, "bytes": 0}
        if limits.keys() & used.keys():
            used = measure(snapshot, tenant)
        for kind, added in (("names", int(is_new)), ("bytes", nbytes)):
            if added > 0 and used[kind] + added > limits.get(kind, float("inf")):
                what = "adapters and profiles" if kind == "names" else "bytes of adapters, profiles and scorecards"
                message = f"The tenant {tenant!r} has {used[kind]} {what}, and a limit of {limits[kind]:.0f}"
                raise ApiError(409, f"{message}; this adds {added}: delete some first.")


def measure(snapshot: Snapshot, tenant: str) -> dict[str, int]:
    """The names and bytes that a tenant has."""
    adapters = _own({*snapshot.adapters, *snapshot.damaged_adapters}, tenant)
    profiles = _own({*snapshot.profiles, *snapshot.damaged_profiles}, tenant)
    rows = sum(snapshot.profile_bytes[key] for key in _own(snapshot.profile_bytes, tenant))
    for key in _own(snapshot.scorecard_counts, tenant):
        rows += snapshot.scorecard_bytes[key] + ROW_BYTES * snapshot.scorecard_counts[key]
    files = _add_up(snapshot, tenant, _list_adapters(snapshot, tenant))
    return {"names": len(adapters) + len(profiles), "bytes": files + rows}


def _own(keys: Iterable[str], tenant: str) -> list[str]:
    return [key for key in keys if split_key(key)[0] == tenant]


def _list_adapters(snapshot: Snapshot, tenant: str) -> dict[str, AdapterRecord]:
    return {key: record for key, record in snapshot.adapters.items() if record.tenant == tenant}


def _add_up(snapshot: Snapshot, tenant: str, own: Mapping[str, AdapterRecord]) -> int:
    """Bytes of the adapters that are a tenant's `own`, and of those that have lost their name there while a version of
    its profiles pins them; what is public, or was, is nobody's but the operator's.
    """
    sizes, free = dict[str, int](), {record.digest for record in own.values()}
    for record in chain(snapshot.adapters.values(), snapshot.nameless.values()):
        sizes[record.digest] = int(record.info["bytes"])
        if tenant and not record.tenant:
            free.add(record.digest)
    kept = {digest for digest, profiles in snapshot.pins.items() if _own(profiles, tenant)} - free
    return sum(int(r.info["bytes"]) for r in own.values()) + sum(sizes.get(digest, 0) for digest in kept)
