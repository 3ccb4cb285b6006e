"""Who uses what is loaded: a tenant learns of its own requests, of what it shares with others."""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable

from service.tenants import join_key

MAX_USED = 4096
"""Fusions of which is known when they were used last."""


class Uses:
    """When a tenant's requests last had a fusion, and how many run on each stack and build; "" stands for everybody."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, float] = OrderedDict()
        self._running: Counter[str] = Counter()

    def begin(self, tenant: str, key: str, digest: str) -> Callable[[], None]:
        """A request has the fusion `digest` on the stack or build `key`; returns what ends it."""
        owners, now = {"", tenant}, time.time()
        for owner in owners:
            self._last[join_key(owner, digest)] = now
            self._last.move_to_end(join_key(owner, digest))
            self._running[join_key(owner, key)] += 1
        while len(self._last) > MAX_USED:
            self._last.popitem(last=False)

        def end() -> None:
            for owner in owners:
                self._running[join_key(owner, key)] -= 1
                if not self._running[join_key(owner, key)]:
                    del self._running[join_key(owner, key)]

        return end

    def find_last(self, tenant: str, digest: str) -> float | None:
        """When a request of the tenant last had a fusion (Unix time); None when that is not known."""
        return self._last.get(join_key(tenant, digest))

    def count(self, tenant: str, key: str) -> int:
        """How many requests of the tenant run on a stack or build now."""
        return self._running[join_key(tenant, key)]
