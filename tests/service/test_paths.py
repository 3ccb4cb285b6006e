"""Paths as people write them: a final slash, HEAD for GET, a route that needs a flag."""

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from service.front import FinalSlashes, RouteFilter


@pytest.fixture
def http() -> TestClient:
    app = FastAPI(redirect_slashes=False)

    @app.get("/v1/models/{name:path}")
    @app.get("/v1/models")
    @app.get("/version")
    async def answer() -> str:
        return "fine"

    @app.post("/ask")
    async def ask() -> str:
        return "fine"

    return TestClient(FinalSlashes(RouteFilter(app, app.routes), app.routes), follow_redirects=False)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/version/", "../version"),
        ("/v1/models/?a=%2F&b", "../models?a=%2F&b"),
        ("/v1/models/%C3%A4%20%3F/", "../%C3%A4%20%3F"),
        ("/v1/models/0.5*a + 1*b/", "../0.5*a%20+%201*b"),
        ("/v1/models/org%2Fadapter/", "../org%2Fadapter"),
        ("/v1/models/org/adapter@v1/", "../adapter@v1"),
        ("/ask/", "../ask"),
        ("/nowhere/", None),
        ("/v1//models/", None),
        ("/version//", None),
        ("//version/", None),
        ("/", None),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "DELETE"])
def test_a_final_slash_leads_to_the_route_there_is(http: TestClient, path: str, place: str | None, method: str) -> None:
    answer = http.request(method, f"http://testserver{path}")  # C9
    assert answer.headers.get("location") == place
    assert answer.status_code == 307 if place else answer.status_code in (404, 405)


def test_head_is_answered_where_get_is(http: TestClient) -> None:  # C15
    assert http.head("/version").status_code == 200
    answer = http.head("/ask")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert http.head("/nowhere").status_code == 404


def test_a_route_that_needs_a_flag_says_which(http: TestClient) -> None:  # C13
    message = http.get("/tokenizer_info").json()["error"]["message"]
    assert "--enable-tokenizer-info-endpoint" in message
