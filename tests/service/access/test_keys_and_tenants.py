"""Keys, roles and tenants: every route asked by every role, of one's own things and of another's."""

import itertools
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.callers import ROLES
from service.edge.access import OPEN_PATHS
from service.roles import LEAST
from tests.clients.gateway import run_gateway
from tests.conftest import BASE_NAME
from tests.service.access.conftest import ASK, TENANTS, Served

WRONG = (401, 429)
"""What a wrong key is answered: after ten of them within a minute, 429."""


def fill_path(path: str) -> str:
    """A path as a route has it, of something that does not exist."""
    for part in ("{name:path}", "{name:name}", "{profile:profile}", "{profile:name}"):
        path = path.replace(part, "no-such")
    return path.replace("{digest}", "e" * 64).replace("{scorecard_id}", "1").replace("{key_id}", "0" * 12)


@pytest.mark.parametrize("route", LEAST, ids=" ".join)
def test_a_route_answers_its_roles_alone(served: Served, route: tuple[str, str]) -> None:
    method, path = route[0], fill_path(route[1])
    if path not in OPEN_PATHS:
        for headers in ({}, {"authorization": "Bearer lf-000000000000-" + "a" * 43}):
            stranger = httpx.request(method, served.url + path, json={}, headers=headers, timeout=60)
            assert stranger.status_code in WRONG
    for tenant, role in itertools.product(TENANTS, ROLES):
        with served.client(tenant, role) as http:
            answer = http.request(method, path, json={})
            is_enough = ROLES.index(role) >= ROLES.index(LEAST[route])
            refused = answer.status_code == 403 and "needs the role" in answer.text
            assert refused != is_enough, (tenant, role, answer.text[:300])
            assert answer.status_code not in (401, 500), answer.text[:300]


def list_reads(tenant: str, digest: str) -> list[str]:
    """Paths that show what a tenant has, by its names."""
    names = ("own", f"{tenant}-secret", "both", f"{tenant}-profile", f"{tenant}-profile@1", f"0.5*{tenant}-secret")
    paths = [f"/v1/{noun}/{name}" for noun in ("models", "adapters", "fusions") for name in names]
    lists = ["/v1/models", "/v1/adapters", "/v1/fusions", "/v1/scorecards", "/v1/fusions/plan"]
    return [*lists, *paths, f"/v1/scorecards/{digest}", f"/v1/fusions/{tenant}-profile/export"]


@pytest.mark.parametrize(("tenant", "role"), list(itertools.product(TENANTS, ROLES[:2])))
def test_no_answer_shows_what_another_tenant_has(served: Served, tenant: str, role: str) -> None:
    with served.client(tenant, role) as http:
        for other in set(TENANTS) - {tenant}:
            texts = [http.get(path).text for path in list_reads(other, served.digests[other])]
            for name in (f"{other}-secret", f"{other}-profile", f"0.5*{other}-secre", f"{other}-profil"):
                texts.append(http.post("/v1/chat/completions", json=ASK | {"model": name}).text)
                texts.append(http.post("/v1/fusions/plan", json={"fusion": name}).text)
                texts.append(http.delete(f"/v1/adapters/{name}").text)
                texts.append(http.delete(f"/v1/fusions/{name}").text)
                texts.append(http.post(f"/v1/fusions/{name}/rollback", json={"version": 1}).text)
            texts.append(http.get("/v1/models", params={"tenant": other}).text)
            asked = {f"{other}-secret", f"{other}-profile"}  # what an answer repeats of a request
            for text in texts:
                assert f"{other}-system" not in text
                assert f'"{other}-secret"' not in text
                assert not asked & set(_list_ids(text))
            cards = http.get(f"/v1/scorecards/{served.digests[other]}")
            assert not cards.is_success or not cards.json()["data"]
    with served.client(tenant, "user") as http:  # nothing of it is gone
        ids = [card["id"] for card in http.get("/v1/models").json()["data"]]
        assert set(ids) == {BASE_NAME, "task", "own", f"{tenant}-secret", "both", f"{tenant}-profile"}


def _list_ids(text: str) -> list[str]:
    try:
        content: Any = httpx.Response(200, text=text).json()
    except ValueError:
        return []
    rows = content.get("data", [content]) if isinstance(content, dict) else []
    return [str(row.get("id", row.get("name"))) for row in rows if isinstance(row, dict)]


def test_one_name_answers_each_tenant_with_its_own(served: Served) -> None:
    digests = set()
    for tenant in TENANTS:
        with served.client(tenant, "user") as http:
            answer = http.post("/v1/chat/completions", json=ASK | {"model": "both"})
            assert (answer.status_code, answer.headers["x-fusion-mode"]) == (200, "mixed")
            assert answer.headers["x-fusion-digest"] == served.digests[tenant]
            assert "|" not in answer.text
            digests.add(answer.headers["x-fusion-digest"])
            hidden = http.get("/v1/fusions/both").text
            assert f"{tenant}-system" not in hidden
            for reveals in ({"echo": True}, {"prompt_logprobs": 0}, {"prompt_logprobs": False}):
                shown = http.post("/v1/chat/completions", json=ASK | {"model": "both"} | reveals)
                assert shown.status_code == 403, reveals
        with served.client(tenant, "deployer") as http:
            assert http.get("/v1/fusions/both").json()["defaults"]["system"] == f"{tenant}-system"
    assert len(digests) == len(TENANTS)


def test_public_things_are_used_by_all_and_changed_by_the_operator(served: Served) -> None:
    for tenant in TENANTS:
        with served.client(tenant, "deployer") as http:
            assert http.post("/v1/chat/completions", json=ASK | {"model": "0.5*task + 0.5*own"}).status_code == 200
            assert http.delete("/v1/adapters/task").status_code == 403
            assert http.post("/v1/unload_lora_adapter", json={"lora_name": "task"}).status_code == 403
    with served.client() as http:
        mine = [card["name"] for card in http.get("/v1/adapters").json()["data"]]
        theirs = [card["name"] for card in http.get("/v1/adapters", params={"tenant": "acme"}).json()["data"]]
        assert mine == ["task"]
        assert {"own", "acme-secret"} <= set(theirs)


def test_the_operator_s_deployer_is_in_no_tenant(served: Served) -> None:
    with served.client("", "deployer") as http:
        for path in ("adapters/acme%7Cown", "fusions/acme%7Cboth", "adapters/own", "fusions/both"):
            assert http.get(f"/v1/{path}").status_code == 404
            assert http.delete(f"/v1/{path}", headers={"if-match": '"a"'}).status_code in (400, 404)
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "acme|own"}).status_code == 404
    with served.client("acme", "user") as http:
        assert http.get("/v1/adapters/own").status_code == 200


def test_a_key_that_is_rotated_or_revoked_opens_no_more(served: Served) -> None:
    with served.client() as http:
        made = http.post("/v1/keys", json={"role": "user", "tenant": "acme"}).json()
        new = http.post(f"/v1/keys/{made['id']}/rotate", json={"grace": "0s"}).json()

        def ask(key: str) -> int:
            return httpx.get(f"{served.url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

        assert ask(made["key"]) in WRONG
        assert ask(new["key"]) == 200
        http.delete(f"/v1/keys/{made['id']}").raise_for_status()
        assert ask(new["key"]) in WRONG
        assert http.post("/v1/keys", json={"role": "admin", "tenant": "acme"}).status_code == 400
        assert made["key"] not in http.get("/v1/keys").text + http.get("/v1/audit").text


def test_a_gateway_asks_with_its_key(served: Served, tmp_path: Path) -> None:
    """LiteLLM's proxy passes recipes, profiles, the key `fusion`, streams and errors."""
    with served.client("acme", "user") as http:
        expected = http.post("/v1/chat/completions", json=ASK | {"model": "both"}).json()["choices"][0]["message"]
    with run_gateway(tmp_path, served.url, served.keys["acme", "user"]) as http:

        def ask(model: str, **more: object) -> httpx.Response:
            return http.post("/v1/chat/completions", json={**ASK, "model": f"fusion/{model}", **more})

        for answer in (ask("both"), ask(BASE_NAME, fusion="both"), ask("acme-profile")):
            assert answer.json()["choices"][0]["message"]["content"] == expected["content"]
            assert answer.headers["llm_provider-x-fusion-digest"] == served.digests["acme"]
        mixed = ask("0.5*task + 0.5*own"), ask(BASE_NAME, fusion="answer({*.mlp.*: 0.2, *: 1}*own + 0.5*task)")
        assert [answer.headers["llm_provider-x-fusion-mode"] for answer in mixed] == ["mixed", "mixed"]
        lines = ask("both", stream=True).text.splitlines()
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert data.pop() == "[DONE]"
        assert (
            "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in data)
            == (expected["content"])
        )
        missing = ask("globex-secret")
        assert (missing.status_code, "There is no model 'globex-secret'" in missing.text) == (404, True)
        stranger = http.post("/v1/chat/completions", json=ASK, headers={"authorization": "Bearer no"})
        assert stranger.status_code in (400, 401)  # 400 where the proxy has no database of keys
