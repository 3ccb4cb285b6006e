"""The edge's middlewares, each before an app that answers 200 to all it is passed."""

import logging
from typing import Any

import pytest

from service.edge.access import Access, allowed_hosts
from service.edge.faults import Faults
from service.edge.hosts import Hosts
from service.edge.keys import RequireKey
from service.edge.media_types import MediaTypes
from service.edge.paths import Paths
from service.edge.request_ids import RequestIds
from service.errors import ApiError
from service.settings import Settings, SettingsError
from tests.service.edge_app import answer_ok, check, client, fail, identify_right, status


@pytest.mark.parametrize(
    ("settings", "host", "expected"),
    [
        ({}, "evil.example", 421),
        ({}, "evil.example:3000", 421),
        ({}, "localhost.evil.example", 421),
        ({}, "127.0.0.1.evil.example", 421),
        ({}, "LocalHost.:3000", 200),
        ({}, "10.2.3.4:3000", 200),  # a kubelet's probe
        ({}, "[::1]:3000", 200),
        ({}, "[fe80::7:8]", 200),
        ({}, "::1", 400),
        ({}, "[evil.example]", 400),
        ({}, "[127.0.0.1]", 400),
        ({}, "", 400),
        ({}, "a b", 400),
        ({}, "user@localhost", 400),
        ({}, "localhost:3000:1", 400),
        ({}, "localhost:x", 400),
        ({}, "localhost/", 400),
        ({}, ".", 400),
        ({"allowed_hosts": ("Fusion.lan",)}, "fusion.LAN.:1", 200),
        ({"allowed_hosts": ("fusion.lan",)}, "a.fusion.lan", 421),
        ({"allowed_hosts": ("*",)}, "anything.example", 200),
        ({"host": "0.0.0.0"}, "anything.example", 200),
        ({"host": "0.0.0.0", "allowed_hosts": ("fusion.lan",)}, "anything.example", 421),
        ({"host": "0.0.0.0", "allowed_hosts": ("fusion.lan",)}, "localhost", 200),
        ({"host": "fusion.lan"}, "fusion.lan", 200),
        ({"host": "::1"}, "evil.example", 421),
        ({"host": "localhost"}, "evil.example", 421),
    ],
)
async def test_hosts(anyio_backend: str, settings: dict[str, Any], host: str, expected: int) -> None:
    hosts = allowed_hosts(Settings(**settings))
    app = Hosts(answer_ok, lambda: Access(hosts=hosts))
    assert await status(app, [(b"host", host.encode())]) == expected


async def test_a_request_has_one_host(anyio_backend: str) -> None:
    app = Hosts(answer_ok, Access)
    assert await status(app, []) == 400
    assert await status(app, [], http_version="1.0") == 200
    assert await status(app, [(b"host", b"localhost"), (b"host", b"localhost")]) == 400
    assert await status(app, [(b"host", b"\xff")]) == 400


def test_a_refused_host_is_told_the_setting() -> None:
    answer = check(Hosts, hosts=frozenset()).get("/", headers={"host": "evil.example"})
    assert "FUSION_ALLOWED_HOSTS" in answer.json()["error"]["message"]


@pytest.mark.parametrize("host", ["fusion.lan:3000", "https://fusion.lan", "a b"])
def test_a_setting_that_no_host_equals_is_refused(host: str) -> None:
    with pytest.raises(SettingsError, match="FUSION_ALLOWED_HOSTS"):
        Settings(allowed_hosts=(host,))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("application/json", 200),
        ("Application/JSON ; charset=utf-8", 200),
        ("application/vnd.fusion+json", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("text/json", 415),
        ("application/json, text/plain", 415),
        ("text/plain; application/json", 415),
        ("application/jsonp", 415),
        ("", 415),
        (None, 415),
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "PROPFIND"])
def test_bodies_are_json(method: str, kind: str | None, expected: int) -> None:
    headers = {} if kind is None else {"content-type": kind}
    for content in (b"{}", iter([b"{}"])):  # of known length, and in chunks
        answer = check(MediaTypes).request(method, "/v1/fusions/p", content=content, headers=headers)
        assert answer.status_code == expected
        if expected == 415:
            assert "Content-Type: application/json" in answer.json()["error"]["message"]


async def test_two_content_types_are_none(anyio_backend: str) -> None:
    kinds = [(b"content-type", b"application/json"), (b"content-type", b"text/plain")]
    assert await status(MediaTypes(answer_ok), [(b"content-length", b"2"), *kinds], method="POST") == 415


def test_what_has_no_body_needs_no_type() -> None:
    for method in ("GET", "HEAD", "OPTIONS", "DELETE", "POST"):
        assert check(MediaTypes).request(method, "/").status_code == 200
    assert check(MediaTypes).request("POST", "/", headers={"content-length": "00"}).status_code == 200


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("", 200),
        ('; charset=utf-8; x="charset"', 415),
        ("; charset=UTF-8", 200),
        ('; charset="utf8"; x=1', 200),
        ("; charset=punycode", 415),  # its decoder takes 8 s for 1 MB
        ("; charset=undefined", 415),  # its decoder fails in its own way
        ("; charset=utf-8; charset=undefined", 415),
        ("; charset*0=puny; charset*1=code", 415),
        ("; CharSet*=utf-8''undefined", 415),
        ("; charset=" + "x" * 60_000, 415),  # Python remembers each name it does not know
    ],
)
def test_uploads_are_utf_8(parameters: str, expected: int) -> None:
    headers = {"x-fusion-upload": "1", "content-type": f"multipart/form-data; boundary=x{parameters}"}
    assert check(MediaTypes).post("/v1/adapters", content=b"x", headers=headers).status_code == expected


@pytest.mark.parametrize(
    ("method", "path", "mark", "expected"),
    [
        ("POST", "/v1/adapters", "1", 200),
        ("POST", "/v1/adapters", "0", 415),
        ("POST", "/v1/adapters", None, 415),
        ("POST", "/v1/fusions/plan", "1", 415),
        ("PUT", "/v1/adapters", "1", 415),
    ],
)
def test_uploads_need_a_header_of_our_own(method: str, path: str, mark: str | None, expected: int) -> None:
    headers = {} if mark is None else {"x-fusion-upload": mark}
    answer = check(MediaTypes).request(method, path, files={"file": b"x"}, headers=headers)
    assert answer.status_code == expected
    if path == "/v1/adapters" and method == "POST" and expected == 415:
        assert "'X-Fusion-Upload: 1'" in answer.json()["error"]["message"]


def test_keys_guard_all_but_health_checks_and_the_description() -> None:
    http = check(RequireKey, identify=identify_right)
    for path in ("/v1/models", "/version", "/nowhere", "/metrics", "/metrics/", "/schema.json", "/docs/../v1/models"):
        assert http.get(path).status_code == 401
        assert http.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
        assert http.get(path, headers={"authorization": "Bearer right"}).status_code == 200
    for path in (
        "/livez",
        "/readyz",
        "/healthz",
        "/health",
        "/ping",
        "/docs",
        "/openapi.json",
        "/docs/assets/x",
        "/",
        "/page/x",
    ):
        assert http.get(path).status_code == http.head(path).status_code == 200
        assert http.post(path).status_code == 401  # it would reach the intake
    assert http.options("/version").status_code == 200


def test_metrics_are_open_when_a_setting_says_so() -> None:
    assert check(RequireKey, identify=identify_right, public_metrics=True).get("/metrics").status_code == 200
    assert check(RequireKey).get("/metrics").status_code == 200  # without keys


def test_metrics_wait_until_the_keys_are_known() -> None:
    http = client(RequireKey(answer_ok, Access))
    answer = http.get("/metrics")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert http.get("/livez").status_code == 200


def test_an_error_says_once_when_to_come_again() -> None:
    assert ApiError(503, "x", headers={"Retry-After": "9"}).headers == {"retry-after": "9"}
    assert ApiError(429, "x").headers == {"retry-after": "5"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [("5f0c-1:a.b_c=+", 200), ("x" * 128, 200), ("x" * 129, 400), ("", 400), ("../x", 400), ("a b", 400), ("ä", 400)],
)
async def test_ids_are_plain(anyio_backend: str, value: str, expected: int) -> None:
    for name in (b"x-request-id", b"x-session-id"):
        ids = [(name, value.encode("latin-1")), (name, b"plain")]  # vLLM reads the first
        assert await status(RequestIds(answer_ok), ids) == expected


def test_plain_ids_return_and_others_do_not() -> None:
    http = client(RequestIds(answer_ok))
    ids = {"x-request-id": "req-1", "x-session-id": "ab" * 32}
    answer = http.get("/v1/models", headers=ids)
    assert {name: answer.headers[name] for name in ids} == ids
    assert not ids.keys() & http.get("/v1/models").headers.keys()
    refused = http.get("/v1/models", headers=ids | {"x-session-id": "a b"})
    assert (refused.status_code, ids.keys() & refused.headers.keys()) == (400, set())


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/models/0.5*a + 1*ä", 200),
        ("/a\nb", 404),
        ("/a\x1b[31m", 404),
        ("/\x9b", 404),
        ("*", 404),
        ("/" + "x" * 16384, 414),
    ],
)
async def test_paths_are_printable(anyio_backend: str, path: str, expected: int) -> None:
    assert await status(Paths(answer_ok), [], path=path) == expected


def test_what_nobody_answered_is_500_in_the_shape_of_all_errors(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "fusion")
    answer = client(Faults(fail)).get("/")
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "InternalServerError")
    assert "secret" not in answer.text
    assert "secret" in caplog.text


async def test_an_answer_that_has_begun_is_not_begun_again(anyio_backend: str) -> None:
    started = False

    async def send(message: Any) -> None:
        nonlocal started
        if message["type"] == "http.response.start":
            if started:
                raise RuntimeError("an HTTP server's words")
            started = True

    async def receive() -> Any:
        return {"type": "http.request"}

    await Faults(fail)({"type": "http", "path": "/late", "headers": []}, receive, send)
    assert started


async def test_websockets_are_refused(anyio_backend: str) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    await Faults(fail)(scope, receive, send)
    assert sent == [{"type": "websocket.close"}]
    await Faults(fail)({**scope, "extensions": {"websocket.http.response": {}}}, receive, send)
    assert sent[1]["status"] == 404
