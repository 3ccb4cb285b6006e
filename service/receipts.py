"""Receipts: what computed an answer, signed, in the header `x-fusion-receipt`.

A receipt goes out before the answer does, so it says what answered, not what the answer was; it is bound to the request
by the digest of its body.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

from service.callers import Caller
from service.errors import ApiError
from service.policy import Policy, Verdict
from service.pool import Lease
from service.receipt_keys import Key
from service.records import now
from service.resolve import Fusion

HEADER = "x-fusion-receipt"
KEY = "receipt"
"""Of a request's body."""
MAX_RECEIPT = 4096
"""Characters of a receipt, since proxies limit what all headers have together."""
LONG = ("recipe", "weights", "parents", "scorecards")
"""What may be longer than that: its SHA-256 stands in its place then, the first ones first."""


@dataclass(slots=True)
class Receipt:
    """The receipt of one answer, until it is signed."""

    key: Key
    content: dict[str, Any]

    def add_lease(self, lease: Lease) -> None:
        """State how the fusion is served."""
        self.content |= {"mode": lease.mode, "rank": lease.rank, "error": float(lease.resident.error)}

    def sign(self, outcomes: Sequence[Mapping[str, object]]) -> str:
        """The signed text; `outcomes` is what a gate chose for each prompt."""
        content = self.content | ({"weights": [*outcomes]} if outcomes else {})
        receipt = self.key.sign(content)
        for name in LONG:
            if len(receipt) <= MAX_RECEIPT:
                break
            if name in content:
                content[name] = {"sha256": digest_json(content[name])}
                receipt = self.key.sign(content)
        return receipt


class Receipts:
    """Begins the receipts of one server; without a key there are none."""

    def __init__(self, key: Key | None, *, base: str, registry: str, policy: Policy) -> None:
        self._key = key
        self._server = {"base": base, "registry": registry}
        self._policy = policy

    def begin(
        self, scope: Scope, raw: bytes, body: Any, fusion: Fusion | None, caller: Caller, verdict: Verdict
    ) -> Receipt | None:
        """The receipt of the answer to a request with the body `raw`, if it asks for one; 400 when there is no key."""
        headers = Headers(scope=scope)
        asked = body.get(KEY) if isinstance(body, dict) else None
        if asked is not None and not isinstance(asked, bool):
            raise ApiError(400, f"{KEY!r} must be true or false, got {json.dumps(asked)[:100]}.", param=KEY)
        if not (asked or headers.get(HEADER, "").strip().lower() == "true"):
            return None
        if self._key is None:
            raise ApiError(400, "This server signs no receipts: FUSION_RECEIPT_KEY is not set.", param=KEY)
        policy = {"id": self._policy.id, "rules": [*verdict.rules], "exempt": verdict.exempt}
        content: dict[str, Any] = self._server | {
            "version": 1,
            "id": secrets.token_hex(8),
            "time": now(),
            "path": scope["path"],
            "request": hashlib.sha256(raw).hexdigest(),
            "request_id": headers.get("x-request-id", ""),
            "key": caller.key,
            "policy": policy,
        }
        if fusion is not None:
            profile = fusion.profile
            content |= {
                "digest": fusion.digest,
                "recipe": fusion.recipe.format(),
                "parents": dict(fusion.parents),
                "profile": None if profile is None else f"{profile.name.rpartition('|')[2]}@{profile.version}",
                "scorecards": [*verdict.scorecards],
            }
        return Receipt(self._key, content)


def digest_json(content: object) -> str:
    """SHA-256 of a part of a receipt, as JSON with sorted keys and no blanks."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
