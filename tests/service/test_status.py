"""`GET /v1/fusions/{name}/status`: how a profile is doing, as its tenant sees it."""

from datetime import UTC, datetime

import pytest

from service.errors import ApiError
from service.scorecards import Scorecards
from tests.service.tenancy import ACME, GLOBEX, Tenancy, ask, put, stocked as stocked

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


async def test_a_profile_is_evicted_until_it_is_asked_for_and_warm_then(stocked: Tenancy) -> None:
    client = stocked.client(ACME, "user")
    pool = stocked.shop.catalog.pool
    pool.forget(stocked.service.registry.adapters["acme|own"].digest)  # its profile's check has loaded it
    before = (await client.get("/v1/fusions/both/status")).json()
    assert (before["state"], before["residence"], before["last_used"]) == ("evicted", None, None)
    assert before["eta_s"] > 0
    assert before["evidence_age_s"] is None
    assert (await ask(stocked, ACME, "both")).status_code == 200
    after = (await client.get("/v1/fusions/both/status")).json()
    assert (after["state"], after["mode"], after["eta_s"], after["last_error"]) == ("warm", "mixed", 0, None)
    assert after["residence"] == {
        "key": (await ask(stocked, ACME, "both")).headers["x-fusion-stack"],
        "kind": "stack",
        "rank": 6,
        "requests": 0,
    }
    assert abs((datetime.now(UTC) - datetime.fromisoformat(after["last_used"])).total_seconds()) < 60
    assert (await client.get("/v1/fusions/both@1/status")).json()["version"] == 1


async def test_a_tenant_sees_the_status_of_its_own_profile_and_of_public_ones(stocked: Tenancy) -> None:
    await ask(stocked, ACME, "both")
    states = {}
    for tenant in (ACME, GLOBEX):
        answer = await stocked.client(tenant, "user").get("/v1/fusions/both/status")
        states[tenant] = (answer.json()["residence"]["rank"], answer.json()["last_used"] is None)
    assert states == {ACME: (6, False), GLOBEX: (3, True)}
    assert (await stocked.client("", "user").get("/v1/fusions/both/status")).status_code == 404
    assert (await stocked.client(GLOBEX, "user").get("/v1/fusions/plain/status")).json()["name"] == "plain"


async def test_a_tenant_learns_of_its_own_requests_alone(stocked: Tenancy) -> None:
    """Of a public profile, and of one of its own with the same fusion as another tenant's."""
    await put(stocked, GLOBEX, "same", "0.5*wide")
    service = stocked.service
    seen: dict[tuple[str, str], list[tuple[str | None, int]]] = {}
    for _ in range(2):
        for tenant, role, name in ((GLOBEX, "user", "plain"), (GLOBEX, "user", "same"), (ACME, "user", "plain")):
            answer = (await stocked.client(tenant, role).get(f"/v1/fusions/{name}/status")).json()
            seen.setdefault((tenant, name), []).append((answer["last_used"], answer["residence"]["requests"]))
        lease = await service.pool.acquire(service.names.view(ACME).look_up("plain"), client="tenant acme")
        service.metrics.begin_lease("stack", lease.resident.key, service.names.look_up("plain").digest, ACME)
    assert seen[GLOBEX, "plain"] == seen[GLOBEX, "same"] == [(None, 0)] * 2
    assert seen[ACME, "plain"][0] == (None, 0)
    assert seen[ACME, "plain"][1][1] == 1
    everybody = (await stocked.client("", "user").get("/v1/fusions/plain/status")).json()
    assert (everybody["residence"]["requests"], everybody["last_used"] is None) == (2, False)


async def test_evidence_is_as_old_as_the_newest_scorecard_that_the_tenant_sees(stocked: Tenancy) -> None:
    own = (await ask(stocked, ACME, "both")).headers["x-fusion-digest"]
    assert (await stocked.client(ACME, "deployer").post(f"/v1/scorecards/{own}", json={"harm": 0})).status_code == 201
    age = (await stocked.client(ACME, "user").get("/v1/fusions/both/status")).json()["evidence_age_s"]
    assert 0 <= age < 60
    public = (await ask(stocked, ACME, "plain")).headers["x-fusion-digest"]
    await stocked.client(ACME, "deployer").post(f"/v1/scorecards/{public}", json={"harm": 0})
    assert (await stocked.client(GLOBEX, "user").get("/v1/fusions/plain/status")).json()["evidence_age_s"] is None


async def test_all_but_the_evidence_is_known_while_the_database_is_away(
    stocked: Tenancy, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = (await ask(stocked, ACME, "both")).headers["x-fusion-digest"]
    client = stocked.client(ACME, "deployer")
    assert (await client.post(f"/v1/scorecards/{digest}", json={"harm": 0})).status_code == 201
    whole = (await client.get("/v1/fusions/both/status")).json()

    async def fail(*_: object) -> object:
        raise ApiError(503, "The registry's database does not answer.")

    async def find_odd(*_: object) -> str:
        return "2026-11-28T10:00:00"

    for fault in (fail, find_odd):
        monkeypatch.setattr(Scorecards, "find_newest", fault)
        answer = await client.get("/v1/fusions/both/status")
        assert answer.status_code == 200
        assert answer.json() == whole | {"evidence_age_s": None, "last_used": answer.json()["last_used"]}


async def test_what_failed_says_why(stocked: Tenancy) -> None:
    engine = stocked.shop.engine
    stocked.shop.catalog.pool.forget(stocked.service.registry.adapters["globex|own"].digest)

    async def fail(*_: object) -> object:
        raise RuntimeError("no room in the engine")

    load, engine.load = engine.load, fail  # type: ignore[method-assign, assignment]  # a fault
    assert (await ask(stocked, GLOBEX, "both")).status_code == 500
    status = (await stocked.client(GLOBEX, "user").get("/v1/fusions/both/status")).json()
    assert (status["state"], status["last_error"]) == ("failed", "no room in the engine")
    engine.load = load  # type: ignore[method-assign]  # as it was
    assert (await ask(stocked, GLOBEX, "both")).status_code == 200
    assert (await stocked.client(GLOBEX, "user").get("/v1/fusions/both/status")).json()["last_error"] is None


async def test_a_profile_s_name_does_not_end_as_the_route(stocked: Tenancy) -> None:
    assert (await put(stocked, ACME, "its/status", "wide")).status_code in (400, 405)
