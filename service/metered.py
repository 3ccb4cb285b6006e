"""An answer on its way to the client: its fusion's headers, its counts, and what it waits for before it begins."""

import time
from collections.abc import Callable
from typing import Any

from starlette.types import Message, Send

from service.decisions import Decisions
from service.errors import RETRY_AFTER_S, ApiError, error_response
from service.limits import Account
from service.metrics import Metrics
from service.pool import Lease
from service.receipts import HEADER, Receipt
from service.registry import Registry
from service.tracing import traces

MAX_HELD = 64
"""Messages of an answer that wait: the first events of a stream come before a gate's decision, or a token."""


class MeteredSend:
    """`send` that adds the fusion's headers and counts the answer's status, tokens and time to the first token."""

    def __init__(
        self,
        send: Send,
        metrics: Metrics,
        registry: Registry,
        entry: dict[str, Any] | None = None,
        *,
        tenant: str = "",
    ) -> None:
        """`entry` is filled with what the request's line in the log says of the answer; `tenant` is the caller's."""
        self.headers: list[tuple[bytes, bytes]] = []
        self.label: str | None = "(refused)"
        """What the answer is counted under; None is not counted."""
        self.decisions: Decisions | None = None
        """What a gate chooses; the answer begins when it has."""
        self.receipt: Receipt | None = None
        """What is signed when the answer begins."""
        self.may_wait = False
        """Whether the answer begins with its first token: before that the engine may find that it has no slot, or that
        a limit has too few tokens left.
        """
        self.account: Account | None = None
        """The limits of the caller, which the answer tells."""
        self._outcomes: list[dict[str, object]] = []
        self._refusal: ApiError | None = None
        self._is_over = False
        self._held: list[Message] = []
        self._send = send
        self._metrics = metrics
        self._registry = registry
        self._start = time.monotonic()
        self._running = 0
        self._entry = {} if entry is None else entry
        self._tenant = tenant
        self._at_end: list[Callable[[], None]] = []

    async def __call__(self, message: Message) -> None:
        """Send a message of the answer, or keep it until the answer begins."""
        if self._is_over:
            return
        if self.decisions is None and not self.may_wait and not self._held:
            await self._pass_on(message)
            return
        self._held.append(message)
        if not self._must_hold(message):
            await self._begin()

    def _must_hold(self, last: Message) -> bool:
        is_end = last["type"] == "http.response.body" and not last.get("more_body", False)
        if is_end or len(self._held) > MAX_HELD or self._refusal is not None:
            return False
        return self.may_wait or (self.decisions is not None and not self.decisions.complete)

    async def _begin(self) -> None:
        """Send what was held; in its place the refusal, if there is one."""
        if self.decisions is not None and self.decisions.any:
            self.headers += self.decisions.headers()
            self._outcomes = self.decisions.outcomes()
        messages, self._held, self.decisions, self.may_wait = self._held, [], None, False
        if self._refusal is not None:
            response, self._is_over = error_response(self._refusal), True
            messages = [
                {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers},
                {"type": "http.response.body", "body": response.body},
            ]
        for message in messages:
            await self._pass_on(message)

    async def _pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self.receipt is not None and message["status"] < 400:
                self.headers.append((HEADER.encode(), self.receipt.sign(self._outcomes).encode()))
            limits = {} if self.account is None else self.account.headers()
            pairs = [(name.encode(), value.encode()) for name, value in limits.items()]
            message["headers"] = [*message.get("headers", ()), *self.headers, *pairs]
            if message["status"] == 503 and b"retry-after" not in dict(message["headers"]):
                message["headers"].append((b"retry-after", str(RETRY_AFTER_S).encode()))  # vLLM says none
            if self.label is not None:
                self._entry["profile"] = self._series
                self._metrics.requests.labels(self._series, str(message["status"])).inc()
        elif self.label is not None and not message.get("more_body", False):
            self._metrics.request_seconds.observe(self._series, time.monotonic() - self._start)
        await self._send(message)

    @property
    def _series(self) -> str:
        """The label, unless its profile was deleted since: its series must not come back."""
        label = str(self.label)
        return label if label.startswith("(") or label in self._registry.profiles else "(deleted)"

    def call_at_end(self, call: Callable[[], None]) -> None:
        """Call `call` when no generation of this request runs: now, or when the last of them has been aborted.

        When a client is gone or does not read, its answer may end before its generations do.
        """
        self._at_end.append(call)
        self._call_if_ended()

    def begin_usage(self) -> None:
        """Count a generation that runs."""
        self._running += 1

    def begin_answer(self) -> None:
        """Let the answer begin: a token is there."""
        self.may_wait = False

    def count_lease(self, lease: Lease, digest: str) -> Callable[[], None]:
        """Count what the request leases for a fusion, and the time until then; returns what ends it."""
        self._metrics.queue_seconds.observe(self._series, time.monotonic() - self._start)
        self._metrics.served.labels(self._series, lease.mode, lease.source).inc()
        traces.describe(digest=digest, mode=lease.mode, source=lease.source, profile=self._series)
        self._entry |= {"digest": digest, "mode": lease.mode, "source": lease.source}
        return self._metrics.begin_lease(lease.resident.kind, lease.resident.key, digest, self._tenant)

    def record_gap(self, gap_s: float, tokens: int) -> None:
        """Count the time before each of some tokens."""
        if self.label is not None:
            self._metrics.gaps.observe(self._series, gap_s, tokens)

    def refuse(self, message: str) -> None:
        """Answer 503 with this message, if the answer has not begun: the engine's batch has no slot or row for it."""
        if self._refusal is None:
            self._metrics.record_refusal("engine")
        self.answer_with(ApiError(503, message))

    def answer_with(self, error: ApiError) -> None:
        """Answer with this error, if the answer has not begun."""
        self._refusal = error

    def record_usage(self, prompt: int, completion: int, first_token: float | None) -> None:
        """Count a generation of this request that has ended, or was interrupted."""
        for kind, tokens in (("prompt_tokens", prompt), ("completion_tokens", completion)):
            self._entry[kind] = self._entry.get(kind, 0) + tokens
        if self.label is not None:
            self._metrics.tokens.labels(self._series, "prompt").inc(prompt)
            self._metrics.tokens.labels(self._series, "completion").inc(completion)
        if first_token is not None and self.label is not None:
            self._metrics.first_token.observe(self._series, first_token - self._start)
        self._running -= 1
        self._call_if_ended()

    def _call_if_ended(self) -> None:
        while self._at_end and not self._running:
            self._at_end.pop()()
