"""What tenants own, within their limits: names of adapters and profiles, and the bytes of both."""

from collections.abc import Callable, Iterable, Mapping

from service.errors import ApiError
from service.snapshot import Snapshot
from service.tenants import split_key

Values = Mapping[str, float]


class Quotas:
    """The limits of what each tenant owns; checked in the change that adds it, so that they hold for all replicas."""

    def __init__(self, find_limits: Callable[[str], Values] = lambda tenant: {}) -> None:
        self._find_limits = find_limits

    def check_adapter(self, snapshot: Snapshot, key: str, nbytes: int) -> None:
        """Raise 409 when an adapter of so many bytes would be too much for the tenant of its registered name `key`."""
        known = snapshot.adapters.get(key)
        gone = 0 if known is None or snapshot.will_keep(key) is not None else int(known.info["bytes"])
        self._check(snapshot, key, nbytes - gone, is_new=known is None)

    def check_version(self, snapshot: Snapshot, key: str, nbytes: int) -> None:
        """As `check_adapter`, of a version of a profile."""
        self._check(snapshot, key, nbytes, is_new=key not in snapshot.profiles)

    def _check(self, snapshot: Snapshot, key: str, nbytes: int, *, is_new: bool) -> None:
        tenant, _ = split_key(key)
        limits = self._find_limits(tenant)
        used = {"names": 0, "bytes": 0}
        if limits.keys() & used.keys():
            used = measure(snapshot, tenant)
        for kind, added in (("names", int(is_new)), ("bytes", nbytes)):
            if added > 0 and used[kind] + added > limits.get(kind, float("inf")):
                what = "adapters and profiles" if kind == "names" else "bytes of adapters and profiles"
                message = f"The tenant {tenant!r} has {used[kind]} {what}, and a limit of {limits[kind]:.0f}"
                raise ApiError(409, f"{message}; this adds {added}: delete some first.")


def measure(snapshot: Snapshot, tenant: str) -> dict[str, int]:
    """The names and bytes that a tenant has."""

    def own(keys: Iterable[str]) -> list[str]:
        return [key for key in keys if split_key(key)[0] == tenant]

    adapters = own({*snapshot.adapters, *snapshot.damaged_adapters})
    profiles = own({*snapshot.profiles, *snapshot.damaged_profiles})
    files = sum(int(snapshot.adapters[key].info["bytes"]) for key in adapters if key in snapshot.adapters)
    rows = sum(snapshot.profile_bytes[key] for key in own(snapshot.profile_bytes))
    return {"names": len(adapters) + len(profiles), "bytes": files + rows}
