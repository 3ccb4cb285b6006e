"""Who may do what: the table of roles against all routes, every cell asked; keys over HTTP and on the command line.

The service has its routes, its edge and its registry here; in the engine's place is an app with vLLM's paths.
"""

import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from service import audit_cli, keys_cli
from service.callers import CALLER, ROLES, Caller
from service.edge.access import OPEN_PATHS
from service.edge.keys import RequireKey
from service.engine.routes import OPTIONAL, SERVED, route_keys
from service.front import Front, build_app
from service.registry import Registry
from service.resolve import Names
from service.roles import LEAST
from service.routes.openapi import OWN_ROUTERS
from service.settings import CLIENT_KEY, Settings
from tests.service.conftest import make_service

BLANKS = {"{name:path}": "x", "{name:name}": "x", "{profile:profile}": "x", "{profile:name}": "x", "{digest}": "0" * 64}
BLANKS |= {"{scorecard_id}": "1", "{key_id}": "0" * 12}


def fill_in(path: str) -> str:
    return re.sub("{[^}]*}", lambda match: BLANKS[match[0]], path)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Any]:
    registry = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}", timeout_s=5, folder=tmp_path)
    service = make_service(registry, Names("base", registry, max_weight=16, max_norm=1e9), Settings())

    async def answer(request: object) -> PlainTextResponse:
        return PlainTextResponse("fine")

    vllm = service.engine.app
    vllm.router.routes[:] = [Route(path, answer, methods=[method]) for method, path in (*SERVED, *OPTIONAL)]
    service.engine.overflows = None
    yield service
    registry.close()


def test_the_table_has_every_route_and_no_other(service: Any) -> None:
    own = {key for router in OWN_ROUTERS for route in router.routes for key in route_keys(route)}
    assert LEAST.keys() == own | SERVED.keys() | OPTIONAL.keys() | {("GET", "/metrics")}
    service.engine.args.disable_fastapi_docs = False
    app = build_app(service)
    others = {path for route in app.routes for _, path in route_keys(route)} - {path for _, path in own}
    assert others <= {*OPEN_PATHS, "/docs/assets", "/page/{name:path}"}, (
        "all that is not in the table is open to everybody"
    )


def test_what_changes_something_is_not_for_users() -> None:
    asks = {path for method, path in SERVED if method == "POST"} | {"/v1/fusions/plan"}
    for (method, path), role in LEAST.items():
        if method not in ("GET", "HEAD") and path not in asks:
            assert role != "user", (method, path)
        if path.startswith(("/v1/keys", "/v1/audit", "/metrics")):
            assert role == "admin", (method, path)


class As:
    """An app asked by one caller."""

    def __init__(self, app: ASGIApp, caller: Caller) -> None:
        self.app, self.caller = app, caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app({**scope, CALLER: self.caller}, receive, send)


async def test_every_route_is_for_its_role_and_those_above_it(anyio_backend: str, service: Any) -> None:
    app, asked = build_app(service), 0
    service.engine.args.disable_fastapi_docs = False
    for role in ROLES:
        transport = httpx.ASGITransport(As(app, Caller("vllm-1", role)), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            for (method, path), least in LEAST.items():
                if path == "/metrics":  # BentoML's: the edge asks
                    continue
                for sent in (method, "HEAD") if method == "GET" else (method,):
                    answer = await http.request(sent, fill_in(path), headers={"content-type": "application/json"})
                    is_refused = ROLES.index(role) < ROLES.index(least)
                    assert (answer.status_code == 403) is is_refused, (role, sent, path, answer.status_code)
                    if is_refused and sent == method:
                        error = answer.json()["error"]
                        assert error["type"] == "PermissionDeniedError"
                        assert f"needs the role {least!r}, the key vllm-1 has {role!r}" in error["message"]
                    asked += 1
    assert asked > 3 * len(LEAST)


@contextlib.contextmanager
def serve(app: ASGIApp) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


@pytest.fixture
def url(service: Any) -> Iterator[str]:
    """A server without keys."""
    front = Front()
    front.start(service)
    with serve(RequireKey(front, lambda: front.access)) as url:
        yield url


class Shell:
    """The command line of an admin, who has a key or none."""

    def __init__(self, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.url, self.key, self._patch, self._capsys = url, "", monkeypatch, capsys
        self.error = ""

    def __call__(self, *argv: str, code: int = 0) -> str:
        self._patch.setenv(CLIENT_KEY, self.key)
        program = {"keys": keys_cli.main, "audit": audit_cli.main}[argv[0]]
        assert program([*argv[1:], "--url", self.url]) == code
        out, self.error = self._capsys.readouterr()
        return out.strip()


@pytest.fixture
def shell(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(url, monkeypatch, capsys)


def ask(url: str, key: str, method: str, path: str, **options: Any) -> httpx.Response:
    return httpx.request(method, f"{url}{path}", headers={"authorization": f"Bearer {key}"} if key else {}, **options)


def test_keys_are_made_listed_rotated_and_revoked_while_the_server_runs(shell: Shell) -> None:
    url = shell.url
    assert ask(url, "", "GET", "/v1/models").status_code == 200
    shell("keys", "create", "--role", "user", code=1)
    assert "first key must be an admin's" in shell.error
    admin = shell("keys", "create", "--role", "admin", "--label", "ops")
    assert admin not in shell.error
    shell("keys", "list", code=1)
    assert "key is missing or wrong" in shell.error
    assert ask(url, "", "GET", "/v1/models").status_code == 401
    shell.key = admin
    made = json.loads(shell("keys", "create", "--role", "user", "--tenant", "acme", "--expires", "90d", "--json"))
    user = made["key"]
    for key, status in ((user, 200), (admin, 200), (admin[:-1] + "_", 401), ("none", 401)):
        assert ask(url, key, "GET", "/v1/models").status_code == status
        assert ask(url, key, "POST", "/v1/chat/completions", json={}).status_code == status
    assert ask(url, user, "GET", "/v1/keys").status_code == ask(url, user, "GET", "/v1/audit").status_code == 403
    assert ask(url, user, "DELETE", "/v1/adapters/x").status_code == 403
    listed = {key["id"]: key for key in json.loads(shell("keys", "list", "--json"))}
    assert listed[made["id"]] == {
        **{name: value for name, value in made.items() if name != "key"},
        "used": listed[made["id"]]["used"],
    }
    assert listed[made["id"]]["used"] is not None
    table = shell("keys", "list")
    assert "acme" in table
    assert user[16:] not in table + json.dumps(listed)
    rotated = shell("keys", "rotate", made["id"], "--grace", "1h")
    assert [ask(url, key, "GET", "/v1/models").status_code for key in (user, rotated)] == [200, 200]
    shell("keys", "rotate", made["id"], "--grace", "0s")
    assert [ask(url, key, "GET", "/v1/models").status_code for key in (user, rotated)] == [401, 401]
    shell("keys", "revoke", made["id"])
    assert {key["state"] for key in json.loads(shell("keys", "list", "--json"))} == {"active", "revoked"}
    for argv, words in (
        (("revoke", "0" * 12), "No key has the id '000000000000'"),
        (("revoke", "x"), "should match pattern"),
        (("create", "--role", "user", "--tenant", "a|b"), "'tenant' should match"),
        (("create", "--role", "user", "--expires", "soon"), "'expires'"),
        (("rotate", made["id"], "--grace", "x"), "'grace'"),
    ):
        shell("keys", *argv, code=1)
        assert words in shell.error


def test_the_audit_has_every_change_of_a_key_and_no_secret(shell: Shell, tmp_path: Path) -> None:
    url = shell.url
    shell.key = admin = shell("keys", "create", "--role", "admin")
    user = shell("keys", "create", "--role", "user")
    rotated = shell("keys", "rotate", user[3:15])
    shell("keys", "revoke", user[3:15])
    whole = shell("audit", "verify")
    assert "entries 1 to 4" in whole
    head = whole.splitlines()[-1].removeprefix("head: ")
    assert shell("audit", "verify", str(tmp_path / "audit.jsonl"), "--head", head)
    page = ask(url, admin, "GET", "/v1/audit?limit=2&after=1").json()
    assert ([row["id"] for row in page["data"]], page["has_more"], page["last_id"]) == ([2, 3], True, "3")
    by = page["data"][0]["entry"]["by"]
    assert (by["key"], by["role"], by["address"]) == (admin[3:15], "admin", "127.0.0.1")
    content = (tmp_path / "audit.jsonl").read_text() + json.dumps(page)
    assert not [key for key in (admin, user, rotated) if key[16:] in content]


def test_a_change_s_request_id_is_the_answer_s(shell: Shell) -> None:
    url = shell.url
    body = {"role": "admin"}
    given = httpx.post(f"{url}/v1/keys", json=body, headers={"x-request-id": "req-7"})
    key = given.json()["key"]
    made = ask(url, key, "POST", "/v1/keys", json=body)
    rows = ask(url, key, "GET", "/v1/audit").json()["data"]
    assert [row["entry"]["by"]["request"] for row in rows] == ["req-7", made.headers["x-request-id"]]


def test_the_first_key_can_be_made_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FUSION_DATA", str(tmp_path))
    monkeypatch.setenv(CLIENT_KEY, "something")  # no setting of the server's
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert keys_cli.main(["create", "--offline", "--role", "deployer"]) == 1
    assert "first key must be an admin's" in capsys.readouterr().err
    assert keys_cli.main(["create", "--offline", "--role", "admin", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert keys_cli.main(["rotate", made["id"], "--offline"]) == 0
    assert keys_cli.main(["create", "--offline", "--role", "user", "--tenant", "a b"]) == 1
    assert "'tenant' should match" in capsys.readouterr().err
    assert keys_cli.main(["list", "--offline", "--json"]) == 0
    assert [key["id"] for key in json.loads(capsys.readouterr().out)] == [made["id"]]
    assert keys_cli.main(["revoke", made["id"], "--offline"]) == 0
    assert audit_cli.main(["verify", str(tmp_path / "audit.jsonl")]) == 0
    assert "entries 1 to 3" in capsys.readouterr().out
    monkeypatch.setenv("FUSION_NOTHING", "1")
    assert keys_cli.main(["list", "--offline"]) == 2
