"""Random changes by three tenants and the operator: what one tenant is told does not depend on the other two."""

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from adapters import LoraAdapter, save
from tests.adapters import samples
from tests.service.tenancy import Tenancy, open_tenancy

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]
TENANTS = ("acme", "globex", "initech")
SHARED = ("support", "x", "x@1", "org/task")
STEPS = 200
VARYING = re.compile(
    r'"(?:created|scorecard_id)":(?:\d+|"[^"]*")|"state":"(?:warm|evicted)"|"last_id":"\d+"|\b[0-9a-f]{32}\b'
)
"""Times and ids that count all, whether something shared is loaded, and tags, which have the registry's identity."""


@dataclass(frozen=True)
class Step:
    """A request that is made of what its sender has seen last."""

    tenant: str
    method: str
    path: str
    body: Any = None
    condition: str = ""


@dataclass
class World:
    """A server, and what each tenant was told."""

    tenancy: Tenancy
    told: dict[str, list[tuple[int, str, dict[str, str]]]] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)
    tags: dict[tuple[str, str], str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    async def take(self, step: Step) -> None:
        digest = self.digests.get(step.tenant, "0" * 64)
        tag = {"": "", "*": "*", "seen": self.tags.get((step.tenant, step.path), '"none"')}[step.condition]
        headers = {"*": {"if-none-match": "*"}, "": {}}.get(step.condition, {"if-match": tag})
        body = step.body
        if isinstance(body, dict) and "path" in body:
            body = {**body, "path": str(self.tenancy.shop.root / body["path"])}
        client = self.tenancy.client(step.tenant, "admin")
        path = step.path.replace("DIGEST", digest)
        answer = await client.request(step.method, path, json=body, headers=headers)
        if tag := answer.headers.get("etag", ""):
            self.tags[step.tenant, step.path] = tag
        self.digests[step.tenant] = answer.headers.get("x-fusion-digest", digest)
        own = ("etag", "x-fusion-source", "content-length", "x-request-id")
        kept = {name: value for name, value in answer.headers.items() if name not in own}
        text = "a .tar" if path.endswith("/export") and answer.is_success else answer.text
        self.told.setdefault(step.tenant, []).append((answer.status_code, text, kept))
        self.asked[step.tenant] = self.asked.get(step.tenant, "") + f" {step.path} {json.dumps(body)}"

    def list_told(self, tenant: str) -> list[tuple[int, str, dict[str, str]]]:
        return [(status, VARYING.sub("~", text), headers) for status, text, headers in self.told.get(tenant, [])]


def make_step(rng: random.Random) -> Step:
    tenant = rng.choice(("", *TENANTS, *TENANTS))
    names = (*SHARED, *SHARED, f"{tenant}-thing", *(f"{other}-thing" for other in TENANTS))
    name, other = rng.choice(names), rng.choice(names)
    mark = f"{tenant or 'operator'}-mark-{rng.randrange(10**9)}"
    recipe = rng.choice((f"{rng.randint(1, 4) / 4}*`{other}`", f"0.5*`{name}` + {rng.randint(1, 4) / 4}*`{other}`"))
    folder = rng.choice((f"{tenant}-0", f"{tenant}-1", "wide", "narrow") if tenant else ("wide", "narrow", "third"))
    condition = rng.choice(("", "", "", "seen", "*"))
    chat = {"model": rng.choice((name, f"{name}@1", recipe)), "messages": [{"role": "user", "content": "Hi"}]}
    adapter = {"name": name, "path": folder, "replace": rng.random() < 0.3}
    profile = {"fusion": recipe, "description": mark, "defaults": {"system": f"Be {mark}."}}
    steps = (
        *[Step(tenant, "POST", "/v1/adapters", adapter, condition)] * 4,
        *[Step(tenant, "PUT", f"/v1/fusions/{name}", profile, condition)] * 4,
        *[Step(tenant, "POST", "/v1/chat/completions", chat)] * 3,
        Step(tenant, "POST", "/v1/unload_lora_adapter", {"lora_name": name}),
        # A tenant's profile may keep the operator from deleting, which the operator is told.
        Step(tenant, "DELETE" if tenant else "GET", f"/v1/adapters/{name}", None, condition if tenant else ""),
        *[Step(tenant, "DELETE", f"/v1/fusions/{name}", None, condition)] * 3,
        Step(tenant, "POST", f"/v1/fusions/{name}/rollback", {"version": rng.randint(1, 2)}, condition),
        Step(tenant, "POST", "/v1/fusions/plan", {"fusion": rng.choice((name, recipe))}),
        Step(tenant, "POST", "/v1/scorecards/DIGEST", {"by": mark}),
        Step(tenant, "DELETE", "/v1/scorecards/DIGEST"),
        *(Step(tenant, "GET", f"/v1/{noun}") for noun in ("models", "adapters", "fusions", "scorecards")),
        *(Step(tenant, "GET", f"/v1/{noun}/{name}") for noun in ("models", "adapters", "fusions")),
        *(Step(tenant, "GET", path) for path in (f"/v1/fusions/{name}@1", f"/v1/fusions/{name}/export")),
        Step(tenant, "GET", "/v1/scorecards/DIGEST"),
    )
    return rng.choice(steps)


def make_steps(seed: int) -> list[Step]:
    rng = random.Random(seed)
    first = [Step("", "POST", "/v1/adapters", {"name": "x", "path": "wide"})]
    for tenant in TENANTS:
        first += [
            Step(tenant, "POST", "/v1/adapters", {"name": f"{tenant}-thing", "path": f"{tenant}-{rng.randrange(2)}"}),
            Step(tenant, "PUT", "/v1/fusions/support", {"fusion": f"1*x + 0.5*`{tenant}-thing`"}),
        ]
    return first + [make_step(rng) for _ in range(STEPS)]


async def run(folder: Path, steps: Iterable[Step]) -> World:
    async with open_tenancy(folder) as tenancy:
        for tenant in TENANTS:
            for number, adapter in enumerate(make_private(tenant)):
                save(adapter, tenancy.shop.root / f"{tenant}-{number}")
        world = World(tenancy)
        for step in steps:
            await world.take(step)
        return world


@pytest.mark.parametrize("seed", range(4))
async def test_what_others_do_changes_no_answer(tmp_path: Path, seed: int) -> None:
    steps = make_steps(seed)
    everyone = await run(tmp_path / "all", steps)
    statuses = {status for answers in everyone.told.values() for status, *_ in answers}
    assert statuses >= {200, 201, 204, 404, 409, 412}, "the steps reach all kinds of answers"
    for tenant in TENANTS[:1] if seed else TENANTS:
        alone = await run(tmp_path / tenant, [step for step in steps if step.tenant in ("", tenant)])
        for one, other in zip(everyone.list_told(tenant), alone.list_told(tenant), strict=True):
            assert one == other
        assert everyone.list_told("") == alone.list_told(""), "nor the operator's"


@pytest.mark.parametrize("seed", range(4, 7))
async def test_no_answer_names_what_is_another_s(tmp_path: Path, seed: int) -> None:
    world = await run(tmp_path, make_steps(seed))
    digests = {tenant: {adapter.digest for adapter in make_private(tenant)} for tenant in TENANTS}
    for tenant, answers in world.told.items():
        others = [other for other in TENANTS if other != tenant]
        foreign = [word for other in others for word in (f"{other}-mark", f"{other}|", *digests[other])]
        for _, text, headers in answers:
            said = text + str(headers)
            assert not [word for word in foreign if word in said]
            for name in (f"{other}-thing" for other in others):
                assert name not in said or name in world.asked[tenant], "an answer may repeat what was asked"
    assert all(digests[tenant] & set(re.findall("[0-9a-f]{64}", str(world.told[tenant]))) for tenant in TENANTS)


def make_private(tenant: str) -> list[LoraAdapter]:
    """Two adapters that only this tenant registers."""
    first = 20 + 2 * TENANTS.index(tenant)
    return [samples.adapter(seed, 3) for seed in (first, first + 1)]
