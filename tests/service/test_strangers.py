"""Browsers and strangers before the real server: what their requests may not do, learn or write into the log."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.engine.routes import SERVED, UNSERVED
from tests.conftest import Server

EVIL = "http://evil.example"
JSON = {"content-type": "application/json"}
DIGEST = "0" * 64


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def refusal(answer: httpx.Response) -> int:
    """The status of an answer that must be an error in OpenAI's shape."""
    error = answer.json()["error"]
    assert error["code"] == answer.status_code
    assert error["message"]
    assert error["type"]
    return answer.status_code


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "text/plain; application/json", None]
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("POST", "/v1/adapters"),
        ("POST", f"/v1/scorecards/{DIGEST}"),
        ("PUT", "/v1/fusions/p"),
        ("POST", "/v1/fusions/p/rollback"),
        ("POST", "/v1/completions"),
        ("POST", "/tokenize"),
        ("DELETE", "/v1/adapters/wide"),
        ("POST", "/nowhere"),
    ],
)
def test_a_web_page_s_simple_requests_write_nothing(
    http: httpx.Client, method: str, path: str, kind: str | None
) -> None:
    body = b'{"lora_name": "wide", "lora_path": "wide", "name": "x", "path": "wide", "fusion": "wide", "version": 1}'
    headers = {} if kind is None else {"content-type": kind}
    assert refusal(http.request(method, path, content=body, headers=headers)) == 415


def test_a_web_page_cannot_upload(http: httpx.Client) -> None:
    answer = http.post("/v1/adapters", data={"name": "x"}, files={"file": b"x"})
    assert refusal(answer) == 415
    assert "X-Fusion-Upload: 1" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers", [{"origin": EVIL}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}]
)
@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/fusions", "/metrics", "/version", "/v1/completions", "/schema.json"]
)
def test_a_page_of_another_site_is_refused(http: httpx.Client, headers: dict[str, str], path: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
        answer = http.request(method, path, headers=headers | JSON)
        assert refusal(answer) == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_page_of_this_server_is_served(http: httpx.Client, server: Server) -> None:
    own = {"origin": server.url, "sec-fetch-site": "same-origin"}
    assert http.post("/tokenize", json={"prompt": "A"}, headers=own).status_code == 200
    assert http.get("/docs", headers={"sec-fetch-site": "cross-site"}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/livez", "/readyz", "/metrics", "/health", "/docs", "/nowhere"])
def test_another_host_is_refused(http: httpx.Client, path: str) -> None:
    for host in ("evil.example", "evil.example:3000", "localhost.evil.example"):
        assert refusal(http.get(path, headers={"host": host})) == 421
    for host in ("10.1.2.3:3000", "[::1]", "LOCALHOST.:80"):
        assert http.get(path, headers={"host": host}).status_code in (200, 404)


def exchange(server: Server, *lines: str) -> str:
    """What the server answers to the raw head of a request."""
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port or 80), timeout=30) as connection:
        connection.sendall("\r\n".join([*lines, "connection: close", "", ""]).encode("latin-1"))
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def test_a_request_has_one_host(server: Server) -> None:
    assert " 400 " in exchange(server, "GET /v1/models HTTP/1.1")
    assert " 400 " in exchange(server, "GET /v1/models HTTP/1.1", "host: localhost", "host: evil.example")
    assert " 421 " in exchange(server, "GET http://localhost/v1/models HTTP/1.1", "host: evil.example")
    assert " 200 " in exchange(server, "GET /livez HTTP/1.0")


def test_websockets_are_refused(server: Server) -> None:
    upgrade = ("upgrade: websocket", "connection: upgrade", "sec-websocket-version: 13")
    key = "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=="
    assert " 404 " in exchange(server, "GET /v1/realtime HTTP/1.1", "host: localhost", *upgrade, key)


def test_only_listed_routes_of_vllm_are_there(http: httpx.Client) -> None:
    own = {"/docs", "/openapi.json", "/metrics", "/v1/models", "/ping"}
    for method, path in UNSERVED:
        if path not in own:
            assert refusal(http.request(method or "GET", path, headers=JSON)) == 404, path
    for path in ("/schema.json", "/docs.json", "/metrics/", "/livez/", "/pause", "/server_info", "/nowhere"):
        assert refusal(http.get(path)) == 404, path
    paths = http.get("/openapi.json").json()["paths"].keys()
    assert {path for _, path in SERVED} <= paths
    assert not {path for _, path in UNSERVED if path not in own} & paths


def test_files_of_the_description_are_sent_whole(http: httpx.Client) -> None:
    path = "/docs/assets/swagger-ui.css"
    for wrong in ("x", "bytes=5-1", "bytes=99999999999-", "bytes=0-0", ",".join(["bytes=0-1", *["2-3"] * 5000])):
        answer = http.get(path, headers={"range": wrong})
        assert (answer.status_code, len(answer.content)) == (200, int(answer.headers["content-length"]))


@pytest.mark.parametrize(
    "path",
    ["/etc", "/etc-no", "/etc/passwd", "/root", "..", "no", "wide/../no", "/proc/1/cwd", "a\0b", "/" + "x" * 300],
)
def test_no_path_is_confirmed(http: httpx.Client, server: Server, path: str) -> None:
    bodies = [
        ("/v1/adapters", {"name": "x", "path": path}),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path}),
    ]
    for route, body in bodies:
        answer = http.post(route, json=body)
        assert refusal(answer) == 400
        message = answer.json()["error"]["message"].replace(repr(path[:100]), "PATH")
        assert message == "PATH is not a folder inside FUSION_ADAPTER_ROOTS; use one there, or upload a .tar."


def test_a_missing_folder_inside_the_roots_is_told_the_same(http: httpx.Client, server: Server) -> None:
    root = server.adapters["wide"].parent
    said = []
    for path in (root / "no", Path("/no"), server.adapters["wide"] / "adapter_config.json"):
        error = http.post("/v1/adapters", json={"name": "x", "path": str(path)}).json()["error"]
        said.append(error["message"].replace(repr(str(path)[:100]), "PATH"))
    assert len(set(said)) == 1


def test_errors_of_folders_name_no_absolute_path(http: httpx.Client, server: Server) -> None:
    (server.adapters["wide"].parent / "empty").mkdir(exist_ok=True)
    path = str(server.adapters["wide"].parent / "empty")
    message = http.post("/v1/adapters", json={"name": "x", "path": path}).json()["error"]["message"]
    assert "'empty' has no adapter_config.json" in message
    assert str(server.data.parent) not in message


FORGED = "x\r\n2026-01-01T00:00:00+0000 [INFO] forged\x1b[31m"


def test_strangers_forge_no_log_lines(http: httpx.Client, server: Server) -> None:
    start = server.log.stat().st_size
    encoded = "".join(f"%{byte:02x}" for byte in FORGED.encode())
    for path in (f"/{encoded}", f"/v1/models/{encoded}", f"/v1/adapters/{encoded}", "/" + "y" * 9000):
        assert refusal(http.get(path)) == 404
    escaped = json.dumps({"model": FORGED, "prompt": FORGED, "stop": ["\ud800"]})
    assert refusal(http.post("/v1/completions", content=escaped, headers=JSON)) in (400, 404)
    body = {
        "model": "wide",
        "messages": [{"role": FORGED, "content": FORGED}],
        "max_tokens": 1,
        "request_id": "r" * 128,
    }
    http.post("/v1/chat/completions", json=body)
    http.post("/v1/adapters", json={"name": FORGED, "path": FORGED})
    written = server.log.read_bytes()[start:].decode()
    assert re.search(r"path=/x\\r\\n2026", written)  # the access log has the request, escaped
    assert "y" * 300 not in written
    for line in written.splitlines():
        assert line.isprintable()
        assert not line.startswith("2026-01-01")


def test_a_content_type_of_any_bytes_gets_its_whole_answer(http: httpx.Client) -> None:
    answer = http.get("/v1/models", headers={b"content-type": b"\xff"})
    assert answer.json()["object"] == "list"


@pytest.mark.parametrize("head", [b"GET /livez?\xff HTTP/1.1", b"GET /livez HTTP/1.1\r\nUser-Agent: \xff\\x"])
def test_bytes_that_are_no_text_fail_nothing(server: Server, small_server: Server, head: bytes) -> None:
    for one in (server, small_server):  # the second one traces its requests
        start = one.log.stat().st_size
        address = httpx.URL(one.url)
        with socket.create_connection((address.host, address.port or 80), timeout=60) as connection:
            connection.sendall(head + b"\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(2**16), b""))
        assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 ")), answer
        assert b"Traceback" not in one.log.read_bytes()[start:]


@pytest.mark.parametrize("value", ["../../x\0", "a\nb", "", "x" * 129, "ä"])
def test_ids_of_requests_are_plain(http: httpx.Client, value: str) -> None:
    body = {"model": "wide", "prompt": "A", "max_tokens": 1}
    assert refusal(http.post("/v1/completions", json=body | {"request_id": value})) == 400
    if value.isprintable():
        answer = http.post("/v1/completions", json=body, headers={b"x-request-id": value.encode("latin-1")})
        assert refusal(answer) == 400
    good = http.post("/v1/completions", json=body, headers={"x-request-id": "id-1"})
    assert good.json()["id"].startswith("cmpl-id-1")
