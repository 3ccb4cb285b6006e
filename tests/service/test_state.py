"""What operators and pages read: the state of the engine and the limits, and all evidence at once; by tenant."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.callers import Caller
from service.limits import Limits, read_limits
from service.resolve import Fusion
from tests.service.tenancy import ACME, GLOBEX, Tenancy, add, open_tenancy, stock

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


@pytest.fixture
async def stocked(tmp_path: Path) -> AsyncIterator[Tenancy]:
    async with open_tenancy(tmp_path) as tenancy:
        await stock(tenancy)
        await clear(tenancy)
        yield tenancy


async def clear(tenancy: Tenancy) -> None:
    """Empty the engine of what was probed when it was registered."""
    for record in tenancy.service.registry.snapshot.adapters.values():
        tenancy.service.pool.forget(record.digest)
    while (await read(tenancy, "/v1/state"))["free"] < 4:
        await asyncio.sleep(0.001)


async def read(tenancy: Tenancy, path: str, tenant: str = "", role: str = "admin") -> Any:
    answer = await tenancy.client(tenant, role).get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


def fusion(tenancy: Tenancy, tenant: str, text: str) -> Fusion:
    found: Fusion = tenancy.service.names.view(tenant).look_up(text)
    return found


def show(state: Any) -> list[tuple[list[str], str, int, bool]]:
    return [
        (
            [name for adapter in one["adapters"] for name in adapter["names"]],
            one["state"],
            one["requests"],
            one["evictable"],
        )
        for one in state["residents"]
    ]


async def test_the_state_has_what_the_engine_holds_and_who_uses_it(stocked: Tenancy) -> None:
    pool = stocked.service.pool
    free = (await read(stocked, "/v1/state"))["free"]
    async with pool.lease(fusion(stocked, "", "wide")):
        state = await read(stocked, "/v1/state")
        assert show(state) == [(["wide"], "warm", 1, False)]
        assert (state["free"], state["queue"]) == (free - 1, {"waiting": 0, "oldest_s": 0})
    assert show(await read(stocked, "/v1/state")) == [(["wide"], "warm", 0, True)]
    pool.forget(fusion(stocked, "", "wide").parents["wide"])
    assert show(await read(stocked, "/v1/state")) == []


async def test_what_is_on_its_way_is_queued(stocked: Tenancy) -> None:
    opened = stocked.shop.engine.hold()
    waiting = asyncio.create_task(stocked.service.pool.acquire(fusion(stocked, "", "wide")))
    for _ in range(200):
        state = await read(stocked, "/v1/state")
        if state["residents"] and state["residents"][0]["state"] == "loading":
            break
        await asyncio.sleep(0.01)
    assert show(state) == [(["wide"], "loading", 1, False)]
    assert state["queue"]["waiting"] == 1
    assert state["queue"]["oldest_s"] == state["residents"][0]["seconds"]
    opened.set()
    stocked.service.pool.release(await waiting)
    assert (await read(stocked, "/v1/state"))["queue"] == {"waiting": 0, "oldest_s": 0}


async def test_a_tenant_sees_what_only_it_can_use(stocked: Tenancy) -> None:
    await add(stocked, GLOBEX, "same", "wide")  # the content of a public adapter
    await clear(stocked)
    async with AsyncExitStack() as stack:
        for tenant, text in (("", "wide"), (ACME, "0.5*own + 0.5*wide"), (GLOBEX, "own")):
            await stack.enter_async_context(stocked.service.pool.lease(fusion(stocked, tenant, text)))
        admin = await read(stocked, "/v1/state")
        names = sorted(name for shown in show(admin) for name in shown[0])
        assert names == sorted(["wide", "globex|same"] * 2 + ["acme|own", "globex|own"])
        acme = await read(stocked, "/v1/state", ACME, "deployer")
        assert [sorted(shown[0]) for shown in show(acme)] == [["own", "wide"]]
        assert acme["free"] is None
        assert [shown[0] for shown in show(await read(stocked, "/v1/state", GLOBEX, "deployer"))] == [["own"]]
        assert show(await read(stocked, "/v1/state", "initech", "deployer")) == []
        assert [shown[0] for shown in show(await read(stocked, "/v1/state", "", "deployer"))] == [["wide"]]
        assert await read(stocked, f"/v1/state?tenant={ACME}") == acme
    refused = await stocked.client(ACME, "user").get("/v1/state")
    assert refused.status_code == 403


async def test_limits_are_shown_to_whom_they_belong(stocked: Tenancy) -> None:
    service = stocked.service
    table = read_limits({"tenant": {"requests": 10}, "default": {"requests": 4}})
    service.limits = Limits(table, service.registry.ledger, service.metrics)
    for tenant, count in ((ACME, 3), (GLOBEX, 1)):
        service.registry.snapshot.keys[f"key-{tenant}"] = SimpleNamespace(tenant=tenant)
        account = service.limits.find_account(Caller(f"key-{tenant}", "user", tenant))
        for _ in range(count):
            (await account.take("requests")).settle(1)

    def shown(state: Any) -> list[tuple[str, str, float, int]]:
        return [(one["subject"], one["name"], one["limit"], one["used"]) for one in state["limits"]]

    acme = [("key", "key-acme", 4, 3), ("tenant", "acme", 10, 3)]
    globex = [("key", "key-globex", 4, 1), ("tenant", "globex", 10, 1)]
    assert shown(await read(stocked, "/v1/state", ACME, "deployer")) == acme
    assert shown(await read(stocked, "/v1/state")) == [acme[0], acme[1], globex[0], globex[1]]
    assert shown(await read(stocked, "/v1/state", "initech", "deployer")) == []


async def attach(tenancy: Tenancy, tenant: str, text: str, card: dict[str, Any]) -> str:
    digest = fusion(tenancy, tenant, text).digest
    answer = await tenancy.client(tenant, "deployer").post(f"/v1/scorecards/{digest}", json=card)
    assert answer.status_code == 201, answer.text
    return digest


async def test_evidence_is_listed_with_its_recipes_newest_first(stocked: Tenancy) -> None:
    public = await attach(stocked, "", "0.5*wide", {"harm": {"value": 0.1}})
    own = await attach(stocked, ACME, "0.3*own + 0.7*wide", {"fusion": "0.70*wide+.3*own", "n": 1})
    body = await read(stocked, "/v1/evidence", ACME, "user")
    assert [(one["digest"], one["recipe"], one["current"]) for one in body["data"]] == [
        (own, "0.3*own + 0.7*wide", True),
        (public, "0.5*wide", True),  # the card does not say; a profile has it
    ]
    assert body["data"][1]["fusion"] == {"adapters": [{"name": "wide", "weight": 0.5}], "method": "sum"}
    assert body["data"][1]["scorecard"] == {"harm": {"value": 0.1}}
    assert [one["digest"] for one in (await read(stocked, "/v1/evidence", GLOBEX, "user"))["data"]] == [public]
    first = await read(stocked, "/v1/evidence?limit=1", ACME, "user")
    assert (first["has_more"], len(first["data"])) == (True, 1)
    rest = await read(stocked, f"/v1/evidence?limit=1&after={first['last_id']}", ACME, "user")
    assert (rest["has_more"], [one["digest"] for one in rest["data"]]) == (False, [public])


async def test_evidence_says_when_a_name_has_another_content_now(stocked: Tenancy) -> None:
    await attach(stocked, GLOBEX, "0.3*own", {"fusion": "0.3*own"})
    await attach(stocked, GLOBEX, "0.3*own", {"fusion": "own +"})
    changed = await add(stocked, GLOBEX, "own", "narrow", body={"replace": True})
    assert changed.status_code in (200, 201), changed.text
    data = (await read(stocked, "/v1/evidence", GLOBEX, "user"))["data"]
    assert [(one["recipe"], one["current"]) for one in data] == [(None, False), ("0.3*own", False)]


async def test_evidence_with_long_recipes_lets_others_have_turns(stocked: Tenancy) -> None:
    """Cards of the length of the longest recipe, which take the longest to be read."""
    rules = ", ".join(f"*{number:04}*: ramp(0.1..0.{number:04})" for number in range(60))
    recipe = " + ".join(f"{{{rules}, *: 1}}*{'x' * 40}{number}" for number in range(4))
    digest = fusion(stocked, "", "0.5*wide").digest
    for _ in range(60):
        await stocked.service.scorecards.add(digest, {"fusion": recipe[:8000]})
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0)
            longest = max(longest, time.monotonic() - before)

    watching = asyncio.create_task(watch())
    began = time.monotonic()
    assert len((await read(stocked, "/v1/evidence"))["data"]) == 60
    watching.cancel()
    assert longest < max(0.05, (time.monotonic() - began) / 4), f"{longest} s of {time.monotonic() - began} s"
