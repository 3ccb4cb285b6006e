"""Who a request comes from, and how many places of the engine each client takes."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.types import Scope

from service.callers import find_caller
from service.edge.clients import client_name
from service.errors import ApiError
from service.metrics import Metrics

FAIRNESS_ID, OBJECTIVE = "x-llm-d-inference-fairness-id", "x-llm-d-inference-objective"
"""Headers of the Gateway API's inference extension: whose queue a request is in, and what it is for."""


def identify_client(scope: Scope, *, fair: bool = False) -> str:
    """Who sent a request: its tenant, however many keys that has; without one its API key's id, on a server without
    keys its peer's address; with `fair` together with the id by which a router takes tenants apart, hashed.
    """
    caller = find_caller(scope)
    client = f"tenant {caller.tenant}" if caller.tenant else f"key {caller.key}" if caller.key else client_name(scope)
    if fair and (tenant := Headers(scope=scope).get(FAIRNESS_ID)):
        client += " tenant " + sha256(tenant.encode()).hexdigest()
    return client


class ClientPlaces:
    """Counts the stacks and builds that each client holds or waits for, and its requests that wait.

    None is the server itself, which has no limits. One client can fill neither the engine nor the queue.
    """

    def __init__(self, metrics: Metrics, *, limit: int, max_waiting: int) -> None:
        self._metrics = metrics
        self._limit = limit
        self._max_waiting = max(1, max_waiting * 7 // 8)
        self._uses: dict[str, Counter[str]] = {}
        self._waiting: Counter[str] = Counter()

    def check(self, client: str | None, key: str) -> None:
        """Raise `ApiError` 429 when the client may not use `key` now, or not wait for it."""
        if client is not None:
            self._check_uses(client, key)
            self._check_waiting(client)

    def take(self, client: str | None, key: str) -> None:
        """Count one more use of `key`; `ApiError` 429 when the client has `limit` other ones in use."""
        if client is None:
            return
        uses = self._check_uses(client, key)
        uses[key] += 1
        self._uses[client] = uses

    def give_back(self, client: str | None, key: str) -> None:
        """Count one use less."""
        if client is None:
            return
        uses = self._uses[client]
        uses[key] -= 1
        if not uses[key]:
            del uses[key]
        if not uses:
            del self._uses[client]

    @contextmanager
    def wait(self, client: str | None) -> Iterator[None]:
        """Count one request that waits for the block; `ApiError` 429 when an eighth of the queue is left for others."""
        if client is None:
            yield
            return
        self._check_waiting(client)
        self._waiting[client] += 1
        try:
            yield
        finally:
            self._waiting[client] -= 1
            if not self._waiting[client]:
                del self._waiting[client]

    def _check_uses(self, client: str, key: str) -> Counter[str]:
        uses = self._uses.get(client, Counter())
        if key not in uses and len(uses) >= self._limit:
            raise self._refuse(f"uses {len(uses)} stacks and builds at once, the limit (FUSION_MAX_CLIENT_PLACES)")
        return uses

    def _check_waiting(self, client: str) -> None:
        if self._waiting[client] >= self._max_waiting:
            raise self._refuse(f"has {self._waiting[client]} requests that wait, the limit (7/8 of FUSION_MAX_WAITING)")

    def _refuse(self, what: str) -> ApiError:
        self._metrics.record_refusal("client")
        message = f"This client {what}; try again when one of its requests has ended."
        return ApiError(429, message)
