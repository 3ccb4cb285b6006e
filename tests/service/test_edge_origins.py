"""Web pages of other sites at the edge: refused, unless the flags allow them."""

from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from service.decisions import Decisions
from service.edge.access import Access
from service.edge.faults import Faults
from service.edge.origins import Cors, Origins
from service.routes.openapi import FUSION_HEADERS
from tests.service.edge_app import CORS, HERE, SITE, answer_ok, check, client, fail, status


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 200),
        ({"origin": HERE}, 200),
        ({"origin": "HTTP://127.0.0.1:3000"}, 200),
        ({"origin": HERE, "sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"origin": SITE}, 200),
        ({"origin": SITE, "sec-fetch-site": "cross-site"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "https://app.example.evil"}, 403),
        ({"origin": "http://app.example"}, 403),
        ({"origin": "http://127.0.0.1:3001"}, 403),
        ({"origin": "http://127.0.0.1"}, 403),
        ({"origin": "http://127.0.0.1:3000.evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"origin": "127.0.0.1:3000"}, 403),
        ({"origin": "chrome-extension://127.0.0.1:3000"}, 403),
        ({"origin": "https://evil.example", "sec-fetch-site": "same-origin"}, 403),
        ({"origin": HERE, "sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "what?"}, 403),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS"])
def test_pages_of_other_sites_are_refused(method: str, headers: dict[str, str], expected: int) -> None:
    http = check(Origins, cors=CORS)
    answer = http.request(method, "/v1/fusions/p/export", headers=headers)
    assert answer.status_code == expected, answer.text


async def test_two_origins_or_no_host_are_another_site(anyio_backend: str) -> None:
    app = Origins(answer_ok, lambda: Access(cors=CORS))
    here = (b"origin", HERE.encode())
    host = (b"host", b"127.0.0.1:3000")
    assert await status(app, [host, here]) == 200
    assert await status(app, [host, here, here]) == 403
    assert await status(app, [here]) == 403
    assert await status(app, [host, (b"sec-fetch-site", b"none"), (b"sec-fetch-site", b"cross-site")]) == 403


@pytest.mark.parametrize(("origin", "host"), [("https://fusion.lan", "fusion.lan"), ("http://a", "a:80")])
def test_a_proxy_may_speak_tls(origin: str, host: str) -> None:
    assert check(Origins).post("/", headers={"origin": origin, "host": host}).status_code == 200


def test_other_sites_may_read_and_link_what_needs_no_key() -> None:
    for path in ("/docs", "/docs/assets/swagger-ui.css", "/openapi.json", "/livez", "/health"):
        assert check(Origins).get(path, headers={"sec-fetch-site": "cross-site"}).status_code == 200
        assert check(Origins).post(path, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert check(Origins).get("/metrics", headers={"sec-fetch-site": "cross-site"}).status_code == 403


def test_all_origins_may_be_allowed() -> None:
    http = check(Origins, cors={**CORS, "allow_origins": ("*",)})
    for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
        assert http.post("/", headers=headers).status_code == 200


def cors_app(app: ASGIApp, **changes: Any) -> TestClient:
    access = Access(started=True, cors=CORS | changes)
    return client(Cors(Faults(Origins(app, lambda: access)), lambda: access))


@pytest.mark.parametrize("app", [answer_ok, fail])
def test_allowed_origins_may_read_every_answer_errors_too(app: ASGIApp) -> None:
    answer = cors_app(app).post("/", headers={"origin": SITE})
    assert answer.headers.get_list("access-control-allow-origin") == [SITE]
    assert answer.headers["vary"] == "Origin"


def test_allowed_origins_may_read_what_the_service_says_in_headers() -> None:
    answer = cors_app(answer_ok).post("/", headers={"origin": SITE})
    exposed = {name.lower() for name in answer.headers["access-control-expose-headers"].split(", ")}
    assert exposed >= {*FUSION_HEADERS, "x-request-id", "retry-after"}
    nothing: Any = None
    decisions = Decisions(nothing, nothing, nothing, nothing)
    assert {name.decode() for name, _ in decisions.headers()} <= FUSION_HEADERS.keys()


def test_other_origins_may_read_nothing() -> None:
    answer = cors_app(answer_ok).get("/docs", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    plain = client(Cors(answer_ok, Access)).get("/", headers={"origin": "https://evil.example"})  # no origin is allowed
    assert "vary" not in plain.headers


def preflight(http: TestClient, origin: str, method: str = "PUT") -> Any:
    asked = {"access-control-request-method": method, "access-control-request-headers": "content-type,x-b"}
    return http.options("/v1/fusions/p", headers={"origin": origin} | asked)


def test_preflight_requests_are_answered_as_the_flags_say() -> None:  # C4
    answer = preflight(cors_app(answer_ok), SITE)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, SITE)
    assert "PUT" in answer.headers["access-control-allow-methods"]
    refused = preflight(cors_app(answer_ok), "https://evil.example")
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers
    other = preflight(cors_app(answer_ok, allow_methods=["GET"]), SITE)
    assert (other.status_code, other.json()["error"]["code"]) == (400, 400)
    assert preflight(cors_app(answer_ok, allow_headers=["x-a"]), SITE).status_code == 400
