"""Pinned profiles: they stay in the engine, within a bound, over restarts; and what is told of those that went."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.front import build_app
from service.shipped import warm
from tests.service.policies import make_policy
from tests.service.tenancy import ACME, Tenancy, add, ask, open_tenancy, put

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]
FOLDERS = ("wide", "narrow", "third", "fourth")


@pytest.fixture
async def stocked(tmp_path: Path) -> AsyncIterator[Tenancy]:
    """Four public adapters and a profile of each, in an engine with four places."""
    async with open_tenancy(tmp_path) as tenancy:
        for name in FOLDERS:
            await add(tenancy, "", name, name)
            await put(tenancy, "", f"p-{name}", f"0.5*{name}")
        yield tenancy


async def pin(tenancy: Tenancy, name: str, method: str = "PUT", tenant: str = "", **options: Any) -> httpx.Response:
    client = tenancy.client(tenant, options.pop("role", "deployer"))
    return await client.request(method, f"/v1/fusions/{name}/pin", **options)


async def tell(tenancy: Tenancy, name: str, tenant: str = "") -> Any:
    return (await tenancy.client(tenant, "user").get(f"/v1/fusions/{name}/status")).json()


async def fill_places(tenancy: Tenancy, *sums: str) -> None:
    """Ask for sums of these adapters, each of which takes a place; unless said otherwise for more than there are."""
    for names in sums or ("wide narrow", "wide third", "narrow third", "third fourth", "wide fourth"):
        answer = await ask(tenancy, "", " + ".join(f"0.5*{name}" for name in names.split()))
        assert answer.status_code == 200, answer.text


async def test_a_pinned_profile_is_loaded_and_stays_until_it_is_unpinned(stocked: Tenancy) -> None:
    stocked.shop.catalog.pool.forget(stocked.service.registry.adapters["wide"].digest)
    assert (await tell(stocked, "p-wide"))["state"] == "evicted"
    answer = await pin(stocked, "p-wide")
    assert (answer.status_code, answer.json()["state"], answer.json()["pinned"]) == (200, "warm", True)
    assert answer.headers["etag"]
    await fill_places(stocked)
    status = await tell(stocked, "p-wide")
    assert (status["state"], status["pinned"], status["evicted"]) == ("warm", True, None)
    key = status["residence"]["key"]
    state = (await stocked.client("").get("/v1/state")).json()
    assert [(one["pinned"], one["evictable"]) for one in state["residents"] if one["key"] == key] == [(True, False)]
    assert (await pin(stocked, "p-wide", "DELETE")).status_code == 204
    await ask(stocked, "", "0.5*wide + 0.5*narrow")
    await fill_places(stocked)
    assert (await tell(stocked, "p-wide"))["pinned"] is False


async def test_an_evicted_profile_says_when_why_and_for_what(stocked: Tenancy) -> None:
    await fill_places(stocked, "wide third", "wide fourth", "third fourth", "wide third fourth")
    status = await tell(stocked, "p-narrow")
    assert (status["state"], status["evicted"]["reason"]) == ("evicted", "room")
    assert status["evicted"]["at"].endswith("+00:00")
    residents = (await stocked.client("").get("/v1/state")).json()["residents"]
    assert status["evicted"]["wanted_by"] in [one["key"] for one in residents]
    assert (await tell(stocked, "p-narrow", ACME))["evicted"]["wanted_by"] is None, "what others use is their own"
    stocked.shop.catalog.pool.forget(stocked.service.registry.adapters["fourth"].digest)
    assert (await tell(stocked, "p-fourth"))["evicted"]["reason"] == "gone"


async def test_one_place_stays_for_all_else(stocked: Tenancy) -> None:
    assert [(await pin(stocked, f"p-{name}")).status_code for name in FOLDERS] == [200, 200, 200, 409]
    refused = (await pin(stocked, "p-fourth")).json()["error"]["message"]
    assert "3 profiles are pinned" in refused
    assert "unpin one first" in refused
    await fill_places(stocked)
    assert [(await tell(stocked, f"p-{name}"))["state"] for name in FOLDERS[:3]] == ["warm"] * 3
    assert (await pin(stocked, "p-wide")).status_code == 200, "again: nothing changes"


async def test_pins_are_the_operators_and_take_conditions(stocked: Tenancy) -> None:
    assert (await pin(stocked, "p-wide", tenant=ACME)).status_code == 403
    assert (await pin(stocked, "p-wide", role="user")).status_code == 403
    assert (await pin(stocked, "nobody")).status_code == 404
    assert (await pin(stocked, "p-wide@1")).status_code == 400
    assert (await pin(stocked, "p-wide", headers={"if-match": '"other"'})).status_code == 412
    assert not stocked.service.registry.snapshot.pinned
    tag = (await stocked.client("").get("/v1/fusions/p-wide")).headers["etag"]
    assert (await pin(stocked, "p-wide", headers={"if-match": tag})).status_code == 200


async def test_pins_outlive_a_restart_and_go_with_their_profile(tmp_path: Path) -> None:
    async with open_tenancy(tmp_path) as tenancy:
        for name in ("wide", "third"):
            await add(tenancy, "", name, name)
            await put(tenancy, "", f"p-{name}", f"0.5*{name}")
            await pin(tenancy, f"p-{name}")
        await tenancy.client("", "deployer").delete("/v1/fusions/p-third")
        assert (await pin(tenancy, "p-wide", "DELETE")).status_code == 204
        await pin(tenancy, "p-wide")
        entries = (await tenancy.client("").get("/v1/audit?limit=100")).json()["data"]
        actions = [one["entry"]["action"] for one in entries]
        assert (actions.count("profile.pin"), actions.count("profile.unpin")) == (3, 1)
    async with open_tenancy(tmp_path) as tenancy:
        assert list(tenancy.service.registry.snapshot.pinned) == ["p-wide"]
        assert list(tenancy.service.pins.list_fusions()) == ["p-wide"]
        assert (await tell(tenancy, "p-wide"))["pinned"] is True


async def test_fewer_places_than_pins_leave_one_for_all_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.pool.OWN_TIMEOUT_S", 3)
    async with open_tenancy(tmp_path) as tenancy:
        for name in FOLDERS:
            await add(tenancy, "", name, name)
            await put(tenancy, "", f"p-{name}", f"0.5*{name}")
        tenancy.service.pins = replace(tenancy.service.pins, places=9)  # before the restart
        app = replace(tenancy, app=build_app(tenancy.service))
        assert [(await pin(app, f"p-{name}")).status_code for name in FOLDERS] == [200] * 4
    async with open_tenancy(tmp_path) as tenancy:
        with caplog.at_level("WARNING", "fusion"):
            await warm(tenancy.service)
        assert [record.getMessage() for record in caplog.records] == [
            "4 profiles are pinned, and of 4 places (FUSION_MAX_CPU_LORAS) one stays for all else: "
            "p-wide are not kept; unpin some"
        ]
        await fill_places(tenancy)
        assert [(await tell(tenancy, f"p-{name}"))["state"] for name in sorted(FOLDERS)[:3]] == ["warm"] * 3


async def test_what_the_policy_no_longer_allows_takes_no_place(
    stocked: Tenancy, caplog: pytest.LogCaptureFixture
) -> None:
    await pin(stocked, "p-wide")
    stocked.shop.catalog.pool.forget(stocked.service.registry.adapters["wide"].digest)
    stocked.service.policy = make_policy(stocked.service.registry, adapters=["narrow", "third"])
    with caplog.at_level("WARNING", "fusion"):
        await warm(stocked.service)
    assert "profile 'p-wide' cannot be served now: The policy's rule 'adapters' refuses" in caplog.text
    assert (await tell(stocked, "p-wide"))["state"] == "evicted"
