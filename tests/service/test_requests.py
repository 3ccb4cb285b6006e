"""No request that the API's description leads to is answered 5xx, and each error has the one shape."""

import json
from collections import Counter
from datetime import UTC, datetime

import httpx
import pytest

from tests.conftest import ROOT, Server
from tests.service import requests

RESULT = ROOT / "benchmarks/results/requests.json"


@pytest.fixture
def document(server: Server) -> dict[str, object]:
    with server.http() as http:
        answer: dict[str, object] = http.get("/openapi.json").json()
    return answer


def run(server: Server, asks: list[requests.Ask]) -> list[str]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        faults = [fault for ask in asks if (fault := requests.find_fault(http, ask))]
        assert http.get("/livez").status_code == 200
    return faults


def test_one_bad_key_is_never_a_server_error(server: Server, document: dict[str, object]) -> None:
    assert run(server, requests.sample(requests.one_key_bad(document), 300)) == []


def test_requests_from_the_description_are_never_a_server_error(server: Server, document: dict[str, object]) -> None:
    assert run(server, list(requests.from_schemathesis(document, 75))) == []


@pytest.mark.soak
def test_thousands_of_requests_are_never_a_server_error(server: Server, document: dict[str, object]) -> None:
    asks = {
        "schemathesis": list(requests.from_schemathesis(document, 5000)),
        "one key bad": list(requests.one_key_bad(document)),
    }
    faults = {kind: run(server, some) for kind, some in asks.items()}
    counts = {kind: len(some) for kind, some in asks.items()}
    paths = Counter(f"{ask.method} {ask.path}" for ask in asks["one key bad"])
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": "make soak",
        "requests": counts,
        "bodies_by_route": dict(paths),
        "faults": {kind: some[:20] for kind, some in faults.items()},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    assert counts["schemathesis"] >= 5000
    assert faults == {kind: [] for kind in asks}
