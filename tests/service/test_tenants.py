"""Tenants: each has its own names, sees the public ones besides, and learns of no other's."""

from pathlib import Path

import httpx
import pytest

from service.limits import Limits, read_limits
from service.tenants import SEPARATOR, check_tenant, join_key, split_key
from tests.adapters.samples import BASE
from tests.service.policies import make_policy
from tests.service.tenancy import ACME, GLOBEX, SYSTEM, Tenancy, add, ask, open_tenancy, put, stocked as stocked

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]
VLLM_BODY = {"lora_name": "other", "lora_path": "third"}


async def list_names(client: httpx.AsyncClient, path: str) -> list[str]:
    answer = await client.get(path)
    return [entry.get("id") or entry["name"] for entry in answer.json()["data"]]


async def test_registered_names_are_read_back() -> None:
    for tenant in ("", ACME, "a-b.c_d"):
        for name in ("org/x@1", "acme|own"):
            assert split_key(join_key(check_tenant(tenant), name)) == (tenant, name)
    for wrong in ("a|b", "A", "-a", "a b", "a" * 33, "ä", "a\n"):
        with pytest.raises(ValueError, match="is not a tenant's name: expected at most 32"):
            check_tenant(wrong)


async def test_lists_have_the_tenant_s_own_and_the_public(stocked: Tenancy) -> None:
    wanted = {"": (["wide"], ["plain"]), ACME: (["own", "wide"], ["both", "plain"])}
    wanted |= {GLOBEX: wanted[ACME], "initech": wanted[""]}
    for _ in range(2):  # once more of what is kept
        for tenant, (adapters, profiles) in wanted.items():
            client = stocked.client(tenant, "user")
            assert await list_names(client, "/v1/adapters") == adapters
            assert await list_names(client, "/v1/fusions") == profiles
            assert await list_names(client, "/v1/models") == [BASE, *adapters, *profiles]
    cards = [(await stocked.client(t).get("/v1/models/both")).json()["fusion"] for t in (ACME, GLOBEX)]
    assert [card["recipe"] for card in cards] == ["0.25*own + 0.5*wide", "0.75*own"]


async def test_one_name_is_each_tenant_s_own(stocked: Tenancy) -> None:
    digests = [(await ask(stocked, tenant, "both")).headers["x-fusion-digest"] for tenant in (ACME, GLOBEX)]
    assert digests[0] != digests[1]
    for tenant, recipe in ((ACME, "0.25*own + 0.5*wide"), (GLOBEX, "0.75*own")):
        inline = await ask(stocked, tenant, recipe)
        assert (inline.status_code, inline.headers["x-fusion-recipe"]) == (200, recipe)
        assert inline.headers["x-fusion-digest"] == digests[tenant == GLOBEX]
        assert SEPARATOR not in str(inline.headers.multi_items())
        plan = await stocked.client(tenant, "user").post("/v1/fusions/plan", json={"fusion": recipe})
        assert (plan.status_code, plan.json()["recipe"]) == (200, recipe)
        assert (await stocked.client(tenant, "deployer").get("/v1/fusions/both/export")).status_code == 200
    assert (await put(stocked, ACME, "both", "1*own")).json()["version"] == 2
    assert (await ask(stocked, GLOBEX, "both")).headers["x-fusion-digest"] == digests[1]


@pytest.mark.parametrize("tenant", ["initech", ""])
@pytest.mark.parametrize("name", ["own", "both", "both@1", "acme|own", "acme|both", "acme|both@1"])
async def test_another_s_name_is_one_that_does_not_exist(stocked: Tenancy, name: str, tenant: str) -> None:
    client, nothing = stocked.client(tenant, "deployer"), name.replace("own", "xyz").replace("both", "xyzt")

    async def read_all(name: str) -> list[tuple[int, str]]:
        asked = [
            await ask(stocked, tenant, name),
            await ask(stocked, tenant, f"0.5*`{name}`"),
            await client.post("/v1/fusions/plan", json={"fusion": {"adapters": {name: 1}}}),
            await client.post(f"/v1/fusions/{name}/rollback", json={"version": 1}),
            await client.put("/v1/fusions/made", json={"fusion": f"1*`{name}`"}),
            await client.post("/v1/unload_lora_adapter", json={"lora_name": name}),
        ]
        for path in ("/v1/models", "/v1/adapters", "/v1/fusions"):
            asked += [await client.get(f"{path}/{name}"), await client.get(f"{path}/{name}/export")]
            asked += [await client.delete(f"{path}/{name}", headers=headers) for headers in ({"if-match": '"a"'}, {})]
        plain = name.partition("@")[0]
        return [(a.status_code, a.text.replace(name, "NAME").replace(plain, "NAME")) for a in asked]

    answers = await read_all(name)
    assert {status for status, _ in answers} <= {400, 404, 405}
    assert answers == await read_all(nothing)


async def test_public_things_are_used_by_all_and_changed_by_the_operator_alone(stocked: Tenancy) -> None:
    client = stocked.client(ACME, "admin")
    public = "is public: only the operator may change or delete it"
    for answer in (
        await client.delete("/v1/adapters/wide"),
        await client.delete("/v1/fusions/plain"),
        await client.post("/v1/fusions/plain/rollback", json={"version": 1}),
        await put(stocked, ACME, "plain", "1*own"),
        await client.post("/v1/unload_lora_adapter", json={"lora_name": "wide"}),
        await add(stocked, ACME, "wide", "narrow", body={"replace": True}),
    ):
        assert (answer.status_code, public in answer.text) == (403, True), answer.text
    assert (await add(stocked, ACME, "wide", "narrow")).status_code == 409
    assert (await ask(stocked, ACME, "plain")).status_code == 200


async def test_what_the_operator_names_later_changes_nothing_for_a_tenant_that_has_the_name(stocked: Tenancy) -> None:
    digests = {name: (await ask(stocked, ACME, name)).headers["x-fusion-digest"] for name in ("own", "both", "both@1")}
    assert (await put(stocked, "", "own", "0.125*wide")).status_code == 201
    assert (await add(stocked, "", "both", "fourth")).status_code == 201
    for name, digest in digests.items():
        assert (await ask(stocked, ACME, name)).headers["x-fusion-digest"] == digest
    assert await list_names(stocked.client(ACME), "/v1/models") == [BASE, "own", "wide", "both", "plain"]
    assert await list_names(stocked.client("initech"), "/v1/models") == [BASE, "both", "wide", "own", "plain"]
    assert (await stocked.client(ACME).delete("/v1/fusions/both")).status_code == 204
    assert (await ask(stocked, ACME, "both")).headers["x-fusion-digest"] != digests["both"]


async def test_the_operator_s_admin_sees_a_tenant_s_things_when_it_names_the_tenant(stocked: Tenancy) -> None:
    operator = stocked.client()
    assert await list_names(operator, "/v1/models?tenant=acme") == [BASE, "own", "wide", "both", "plain"]
    assert (await operator.get("/v1/fusions/both?tenant=acme")).json()["defaults"]["system"] == SYSTEM
    assert (await operator.delete("/v1/fusions/both?tenant=acme")).status_code == 204
    assert await list_names(stocked.client(GLOBEX), "/v1/fusions") == ["both", "plain"]
    for tenant, role in (("", "deployer"), (GLOBEX, "admin"), (GLOBEX, "user")):
        answer = await stocked.client(tenant, role).get("/v1/models?tenant=acme")
        assert (answer.status_code, "acme" in answer.text) == (403, False)
    assert (await stocked.client(GLOBEX).get("/v1/models?tenant=globex")).status_code == 200
    assert (await operator.get("/v1/models?tenant=a|b")).status_code == 400


async def test_system_prompts_are_shown_to_those_who_may_change_the_profile(stocked: Tenancy) -> None:
    await put(stocked, "", "told", "1*wide", {"system": SYSTEM, "max_tokens": 3})
    for tenant, role, path, shown in (
        (ACME, "user", "both", False),
        (ACME, "deployer", "both", True),
        (ACME, "admin", "told", False),
        ("", "user", "told", False),
        ("", "deployer", "told", True),
    ):
        client = stocked.client(tenant, role)
        card = (await client.get(f"/v1/fusions/{path}")).json()
        assert (card.get("hidden"), SYSTEM in str(card)) == ((None, True) if shown else (["system"], False))
        assert (SYSTEM in (await client.get("/v1/fusions")).text) == (role != "user")
        answer = await ask(stocked, tenant, path)
        assert answer.json()["got"]["messages"][0] == {"role": "system", "content": SYSTEM}, "it acts for all"


@pytest.mark.parametrize("key", ["echo", "prompt_logprobs", "return_token_ids", "return_prompt_text"])
async def test_no_answer_has_a_prompt_that_its_reader_does_not_see(stocked: Tenancy, key: str) -> None:
    for value in (1, True, "true", *((0, False, 0.0) if key == "prompt_logprobs" else ())):  # vLLM reads false as 0
        refused = await ask(stocked, ACME, "both", **{key: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, key)
    for value in (None, *((False,) if key != "prompt_logprobs" else ())):
        assert (await ask(stocked, ACME, "both", **{key: value})).status_code == 200
    assert (await ask(stocked, ACME, "0.25*own + 0.5*wide", **{key: 1})).status_code == 200
    for role, status in (("user", 403), ("deployer", 200)):
        client, body = stocked.client(ACME, role), {"model": "both", "messages": [{"role": "user", "content": "Hi"}]}
        assert (await client.post("/v1/chat/completions/render", json=body)).status_code == status
        answer = await client.post("/v1/responses", json={"model": "both", "input": "Hi"})
        assert "instructions" not in answer.json()["got"]


async def test_scorecards_belong_to_the_tenant_that_attached_them(stocked: Tenancy) -> None:
    digest = (await ask(stocked, ACME, "plain")).headers["x-fusion-digest"]
    clients = {tenant: stocked.client(tenant, "deployer") for tenant in ("", ACME, GLOBEX)}
    for tenant, client in clients.items():
        assert (await client.post(f"/v1/scorecards/{digest}", json={"by": tenant or "all"})).status_code == 201
    for tenant, client in clients.items():
        seen = {"all", tenant or "all"}
        assert {card["by"] for card in (await client.get(f"/v1/scorecards/{digest}")).json()["data"]} == seen
        assert (await client.get("/v1/models/plain")).json()["fusion"]["scorecards"] == len(seen)
        listed = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}
        assert listed["plain"]["fusion"]["scorecards"] == len(seen)
        counted = (await client.get("/v1/scorecards")).json()["data"]
        assert [(entry["digest"], entry["count"]) for entry in counted] == [(digest, len(seen))]
    public = (await clients[""].get(f"/v1/scorecards/{digest}")).json()["data"][0]["scorecard_id"]
    assert (await clients[ACME].delete(f"/v1/scorecards/{digest}/{public}")).status_code == 404
    assert (await clients[ACME].delete(f"/v1/scorecards/{digest}")).status_code == 204
    assert len((await clients[GLOBEX].get(f"/v1/scorecards/{digest}")).json()["data"]) == 2
    own = (await ask(stocked, GLOBEX, "both")).headers["x-fusion-digest"]
    for tenant, status in ((GLOBEX, 201), (ACME, 404), ("", 404)):
        assert (await clients[tenant].post(f"/v1/scorecards/{own}", json={})).status_code == status


async def test_series_and_events_tell_tenants_apart(stocked: Tenancy) -> None:
    for tenant in (ACME, GLOBEX, ""):
        await ask(stocked, tenant, "both")
    series = stocked.service.metrics.requests.collect()[0].samples
    counts = {s.labels["profile"]: s.value for s in series if s.name.endswith("_total")}
    assert counts == {"acme|both": 1, "globex|both": 1, "(refused)": 1}
    await stocked.client(ACME).delete("/v1/fusions/both")
    labels = {s.labels["profile"] for s in stocked.service.metrics.requests.collect()[0].samples}
    assert labels == {"globex|both", "(refused)"}


async def test_an_adapter_s_uses_are_those_by_its_name(stocked: Tenancy) -> None:
    await add(stocked, ACME, "second", "narrow")
    await add(stocked, GLOBEX, "same", "narrow")
    client = stocked.client(ACME)
    users = [(await client.get(f"/v1/adapters/{name}")).json()["profiles"] for name in ("own", "second", "wide")]
    assert users == [["both"], [], ["both", "plain"]]
    assert (await client.delete("/v1/adapters/second")).status_code == 204
    refused = await client.delete("/v1/adapters/own")
    assert (refused.status_code, "'own' is used by both;" in refused.text) == (409, True), (
        "globex has another name for it"
    )
    named = await stocked.client().delete("/v1/adapters/wide")
    assert "is used by acme|both, plain;" in named.text, "the operator is told whose profiles need it"
    assert (await client.delete("/v1/fusions/both")).status_code == 204
    assert (await client.delete("/v1/adapters/own")).status_code == 204
    assert (await ask(stocked, GLOBEX, "same")).status_code == 200, "its files stay"


async def test_all_of_it_outlives_a_restart(tmp_path: Path) -> None:
    answers: list[list[str]] = []
    for _ in range(2):
        async with open_tenancy(tmp_path) as tenancy:
            if not answers:
                await add(tenancy, ACME, "own", "narrow")
                await put(tenancy, ACME, "both", "1*own")
                digest = (await ask(tenancy, ACME, "both")).headers["x-fusion-digest"]
                await tenancy.client(ACME).post(f"/v1/scorecards/{digest}", json={"a": 1})
            paths = ("/v1/adapters", "/v1/fusions", "/v1/scorecards", "/v1/fusions/both")
            answers.append([(await tenancy.client(t).get(path)).text for t in (ACME, GLOBEX) for path in paths])
    assert answers[0] == answers[1]


async def test_damage_of_shared_files_is_told_without_another_s_name(stocked: Tenancy) -> None:
    await add(stocked, GLOBEX, "aardvark", "narrow")
    digest = (await stocked.client(ACME).get("/v1/adapters/own")).json()["digest"]
    entry = stocked.shop.sources.get(digest)
    assert entry is not None
    next(entry.rglob("adapter_model.safetensors")).write_bytes(b"")
    for tenant, name in ((ACME, "own"), (GLOBEX, "aardvark")):
        plan = await stocked.client(tenant).post("/v1/fusions/plan", json={"fusion": f"2*{name}"})
        assert (plan.status_code, digest[:12] in plan.text, "aardvark" in plan.text) == (500, True, False)
        assert (await stocked.client(tenant).get(f"/v1/adapters/{name}")).json()["state"] == "damaged"


async def test_what_a_change_or_an_export_makes_counts_as_a_build(stocked: Tenancy) -> None:
    table = read_limits({"tenants": {ACME: {"builds": 5}}})
    limits = stocked.service.limits = Limits(table, stocked.service.registry.ledger, stocked.service.metrics)

    def used() -> int:
        return limits.ledger.find((f"tenant {ACME}", "builds")).used

    assert (await put(stocked, ACME, "both", "0.5*own + 0.5*wide")).status_code == 200
    assert used() == 0, "its stack is there"
    svd = "svd(1*own + 1*wide, rank=2)"
    assert (await put(stocked, ACME, "built", svd)).status_code == 201
    assert (await put(stocked, ACME, "built", svd)).status_code == 200
    assert used() == 1
    assert (await add(stocked, ACME, "more", "fourth")).status_code == 201
    assert (await add(stocked, ACME, "more", "none")).status_code == 400
    assert (await stocked.client(ACME, "deployer").get("/v1/fusions/built/export")).status_code == 200
    assert used() == 4
    statuses = [(await put(stocked, ACME, "built", f"svd(0.5*own + 0.{n}*wide, rank=2)")).status_code for n in (1, 2)]
    assert statuses == [200, 429]
    assert stocked.service.registry.profiles[f"{ACME}|built"].version == 3
    for answer in (
        await add(stocked, ACME, "other", "third"),
        await stocked.client(ACME, "deployer").get("/v1/fusions/built/export"),
        await stocked.client(ACME, "deployer").post("/v1/load_lora_adapter", json=VLLM_BODY),
    ):
        assert (answer.status_code, "5 stacks and builds a minute" in answer.text) == (429, True)
    assert (await add(stocked, GLOBEX, "other", "third")).status_code == 201


async def test_what_may_not_answer_is_not_exported(stocked: Tenancy) -> None:
    stocked.service.policy = make_policy(stocked.service.registry, floor=[{"adapter": "wide", "at_least": 0.5}])
    for tenant, name, status in ((ACME, "both", 200), (GLOBEX, "both", 403), (GLOBEX, "plain", 200)):
        answer = await stocked.client(tenant, "deployer").get(f"/v1/fusions/{name}/export")
        assert answer.status_code == status, answer.text
