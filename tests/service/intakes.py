"""An intake before a tiny app in vLLM's place, over a pool without an engine."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from service.callers import CALLER, Caller
from service.client_turns import ClientTurns
from service.engine.models import LoRARequest, ServedModel, served_model
from service.engine.turns import current_priority
from service.evictions import Resident
from service.intake import Intake
from service.metrics import Metrics
from service.pool import Check, Lease
from service.records import AdapterRecord, ProfileVersion, now
from service.registry import Registry
from service.resolve import Fusion, Names
from tests.service.conftest import adapter_info, fill

BASE = "base"
CHAT = "/v1/chat/completions"


@dataclass
class FakePool:
    """In the place of an engine: one stack of two adapters of rank 2 and 3."""

    leased: int = 0
    strict: bool | None = None
    error: Exception | None = None
    is_warm: bool = True
    is_crowded: bool = False

    async def acquire(
        self, fusion: Fusion, *, strict: bool = False, client: str | None = None, check: Check | None = None
    ) -> Lease:
        if self.error is not None:
            raise self.error
        if not self.is_warm and check is not None:
            await check()
        self.leased, self.strict = self.leased + 1, strict
        resident = Resident("ab" * 32, "stack", Path("a"), LoRARequest("~stack/ab", 1000, "/a"), 5)
        return Lease(resident, "warm", ((2, 0.25), (3, -1.5)), 5)

    def is_ready(self, fusion: Fusion) -> bool:
        return self.is_warm

    def home_key(self, fusion: Fusion) -> str:
        return "cd" * 32

    @property
    def checks(self) -> ClientTurns:
        return ClientTurns("checks", 1)

    def may_wait(self, lease: Lease) -> bool:
        return self.is_crowded

    def release(self, lease: Lease) -> None:
        self.leased -= 1


@dataclass
class FakeVllm:
    """Records the bodies that reach it, and what was leased and served meanwhile."""

    pool: FakePool
    bodies: list[bytes] = field(default_factory=list)
    served: list[ServedModel | None] = field(default_factory=list)
    leased: list[int] = field(default_factory=list)
    priorities: list[int] = field(default_factory=list)
    error: Exception | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.bodies.append((await receive())["body"])
        self.served.append(served_model.get())
        self.leased.append(self.pool.leased)
        self.priorities.append(current_priority.get())
        if self.error is not None:
            raise self.error
        await PlainTextResponse("fine")(scope, receive, send)


@dataclass
class Setup:
    """An intake and the parts around it."""

    intake: Intake
    vllm: FakeVllm
    pool: FakePool
    names: Names
    series: CollectorRegistry

    clock: Any = None
    caller: Caller = field(default_factory=Caller)

    def post(self, body: Any, path: str = CHAT, **headers: str) -> Any:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            await self.intake({**scope, CALLER: self.caller}, receive, send)

        client = TestClient(call, raise_server_exceptions=False)
        return client.post(path, content=content, headers={"content-type": "application/json"} | headers)

    def count(self, profile: str, status: int) -> float | None:
        return self.series.get_sample_value("fusion_requests_total", {"profile": profile, "status": str(status)})


def make_setup(tmp_path: Path, **options: Any) -> Setup:
    """An intake over two adapters, `a` and `b`, and the profile `short` of the first."""
    registry = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}", timeout_s=5)
    records = [AdapterRecord(name, name * 64, adapter_info(rank=2), now()) for name in ("a", "b")]
    parents = {"a": "a" * 64}
    defaults = {"max_tokens": 7, "chat_template": "{{ x }}"}
    fill(registry, *records, ProfileVersion("short", 1, "1*a", parents, "c" * 64, defaults))
    pool, series = FakePool(), CollectorRegistry()
    vllm = FakeVllm(pool)
    names = Names(BASE, registry, max_weight=16, max_norm=math.inf)
    intake = Intake(vllm, names, pool, Metrics(series), strict=False, **options)  # type: ignore[arg-type]  # a fake pool
    return Setup(intake, vllm, pool, names, series)
