"""The front before a tiny app: keys, methods, bodies, errors, metric labels, the docs page."""

import math
import re
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import Body, FastAPI
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from service.callers import Caller
from service.engine.overflow import Overflows
from service.engine.proof import Proof
from service.front import Front
from service.records import AdapterRecord, now
from service.registry import Registry
from service.resolve import Names
from service.settings import Settings
from tests.conftest import ROOT
from tests.service.conftest import adapter_info, fill, make_service
from tests.service.rings import make_keys

JSON = {"content-type": "application/json"}
KEY = {"authorization": "Bearer right"}
DIGEST = "0" * 64


@pytest.fixture
def service(tmp_path: Path) -> Any:
    """The parts of a service that need no engine, and a tiny app in vLLM's place."""
    vllm = FastAPI()

    @vllm.get("/version")
    async def version() -> dict[str, str]:
        return {"version": "0"}

    registry = Registry(f"sqlite:///{tmp_path / 'registry.sqlite'}", timeout_s=5)
    fill(registry, AdapterRecord("a", DIGEST, adapter_info(rank=2, norm=2.0), now()))
    service = make_service(registry, Names("base", registry, max_weight=16, max_norm=math.inf), Settings())
    service.proof = Proof(True, "", 0.0, 1.0)
    service.engine.app, service.engine.args = vllm, Namespace(disable_fastapi_docs=False)
    service.engine.cors = {"allow_origins": ()}
    service.engine.overflows = Overflows(count=2, last="2026-01-31T12:00:00+00:00")
    return service


@pytest.fixture
def front(service: Any) -> Front:
    front = Front()
    front.start(service)
    return front


@pytest.fixture
def http(front: Front) -> TestClient:
    return TestClient(front, raise_server_exceptions=False)


def test_importing_the_app_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, service.bento.app; print(sorted({'vllm', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_all_is_503_before_start_and_after_stop(front: Front, service: Any) -> None:
    nonfinite = {"requests": 2, "last": "2026-01-31T12:00:00+00:00"}
    parts = {"mixing": asdict(service.proof), "nonfinite": nonfinite, "registry": {"current": True}}
    parts["access"] = {"keys": False, "loopback_only": True}
    assert front.readiness() == {"ready": True, **parts}
    front.stop()
    for one, state, reason in (
        (front, "stopping", "the server is stopping"),
        (Front(), "starting", "the engine is starting"),
    ):
        answer = TestClient(one).get("/v1/models")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, 503)
        assert int(answer.headers["retry-after"]) > 0
        assert reason in answer.json()["error"]["message"].lower()
        assert one.readiness() == {"ready": False, "state": state, "reason": reason}


def test_a_dead_engine_is_not_ready_and_is_asked_nothing(front: Front, service: Any) -> None:
    service.engine.alive = False
    assert front.readiness() == {"ready": False, "state": "restarting", "reason": "the engine died"}
    answer = TestClient(front).get("/version")  # the engine's routes would fail, or hang
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "engine died" in answer.json()["error"]["message"]


def test_the_access_is_the_settings_and_the_flags(service: Any) -> None:
    service.keys = make_keys(service.registry, Settings(), "left", "right")
    front = Front()
    front.start(service)
    started = front.access
    assert started.identify(Headers(KEY)) == Caller("vllm-2")
    assert front.readiness()["access"] == {"keys": True, "loopback_only": False}
    assert started.hosts == frozenset({"localhost", "127.0.0.1"})
    assert started.cors is service.engine.cors
    front.stop()
    assert front.access is started


def test_what_is_no_own_route_is_vllms(http: TestClient) -> None:
    assert http.get("/version").json() == {"version": "0"}


@pytest.mark.parametrize("method", ["GET", "POST", "BREW"])
@pytest.mark.parametrize(
    "path", ["/nowhere", "/nowhere/", "http://testserver//version/", "/docs.json", "/docs/assets/../x"]
)
def test_what_is_no_route_is_404_in_the_shape_of_all_errors(http: TestClient, method: str, path: str) -> None:
    answer = http.request(method, path, json={"model": "svd(1*a, rank=1)"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "NotFoundError")


def test_only_routes_reach_the_gate(http: TestClient, service: Any) -> None:
    service.pool = None  # a lease would fail
    assert http.post("/version", json={"model": "1*a"}).status_code == 405
    assert http.post("/nowhere", json={"model": "1*a"}).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/nowhere", 404, "No route"),
        ("POST", "/version", 405, "expected GET"),
        ("POST", "/body", 400, "'sizes.1': Input should be a valid integer"),
        ("POST", "/value", 500, "(ZeroDivisionError); see the server log"),
        ("POST", "/type", 400, "wrong type"),
    ],
)
def test_vllms_errors_have_the_one_shape_and_show_nothing_of_the_inside(
    service: Any, method: str, path: str, status: int, words: str
) -> None:
    vllm: FastAPI = service.engine.app

    @vllm.post("/body")
    async def body(sizes: Annotated[list[int], Body(embed=True)]) -> None: ...

    @vllm.post("/value")
    async def value() -> float:
        return 1 / 0

    @vllm.post("/type")
    async def wrong_type() -> None:
        raise TypeError("f() got multiple values for keyword argument 'x'")

    front = Front()
    front.start(service)
    answer = TestClient(front, raise_server_exceptions=False).request(method, path, json={"sizes": [1, "x", "y"]})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, status)
    assert words in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PATCH", "/v1/adapters", "GET, HEAD, POST"),
        ("POST", "/v1/adapters/a", "DELETE, GET, HEAD"),
        ("POST", "/v1/fusions/p", "DELETE, GET, HEAD, PUT"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("HEAD", "/v1/fusions/p/rollback", "POST"),
        ("POST", "/version", "GET, HEAD"),
        ("POST", "/livez", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_told_every_right_one(http: TestClient, method: str, path: str, allowed: str) -> None:
    answer = http.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    if method != "HEAD":
        message = answer.json()["error"]["message"]
        assert message == f"{method} is not allowed on {path!r}; expected {allowed.replace(', ', ' or ')}."


def test_head_answers_as_get(http: TestClient) -> None:
    assert http.head("/v1/models").status_code == http.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/v1/adapters/anything", "/v1/adapters/{name}"),
        ("/v1/models/0.5*a + 1*b", "/v1/models/{name:path}"),
        ("/version", "/version"),
        ("/readyz", "/readyz"),
        ("/docs", "/docs"),
        ("/docs/assets/x", "/docs/assets"),
        ("/invented", "(other)"),
    ],
)
def test_metric_paths_are_bounded(front: Front, path: str, label: str) -> None:
    assert front.metric_path({"type": "http", "method": "GET", "path": path, "root_path": ""}) == label


BODIES = [
    ("PUT", "/v1/fusions/p", {"fusion": "a", "default": {}}, "default", "known keys are fusion, defaults, description"),
    ("PUT", "/v1/fusions/p", {"fusion": "a", "description": 3}, "description", "should be a valid string, got 3"),
    ("PUT", "/v1/fusions/p", {"fusion": "a", "defaults": ["x"]}, "defaults", 'should be an object, got ["x"]'),
    ("PUT", "/v1/fusions/p", {"fusion": "a", "defaults": {"top_p": 2}}, "defaults.top_p", "less than or equal to 1"),
    ("PUT", "/v1/fusions/p", {"fusion": "a", "defaults": {"stop": [1]}}, "defaults.stop", "string"),
    ("PUT", "/v1/fusions/p", {"fusion": "a", "defaults": {"stopp": ""}}, "defaults.stopp", "known keys are system"),
    ("PUT", "/v1/fusions/p", {}, "fusion", "is required"),
    ("POST", "/v1/fusions/plan", {"fusion": 3}, "fusion", "'fusion' must be"),
    ("POST", "/v1/fusions/plan", {"fusion": "a", "x": 1}, "x", "known keys are fusion"),
    ("POST", "/v1/fusions/p/rollback", {"version": True}, "version", "should be a valid integer, got true"),
    ("POST", "/v1/adapters", {"name": "b"}, "source", "Expected either"),
    ("POST", "/v1/adapters", {"name": 7, "path": "x"}, "name", "should be a valid string, got 7"),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "b", "lora_path": "", "more": 1}, "lora_path", "at least 1"),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": None}, "lora_name", "should be a valid string, got null"),
    ("POST", "/v1/scorecards/xyz", {}, "digest", "pattern"),
]


@pytest.mark.parametrize(("method", "path", "body", "param", "words"), BODIES)
def test_wrong_bodies_are_400_and_name_the_key(
    http: TestClient, method: str, path: str, body: Any, param: str, words: str
) -> None:
    answer = http.request(method, path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "BadRequestError"), error
    assert words in error["message"]
    assert "<class" not in error["message"]


JSON_ROUTES = {(method, path.replace("xyz", DIGEST)) for method, path, *_ in BODIES}


@pytest.mark.parametrize(("method", "path"), sorted(JSON_ROUTES))
@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff\xfe", b"[1, 2]", b"7", b"[" * 100_000, b'{"x": NaN}', b'{"x": 1e999}', b'{"x": "\\ud800"}'],
)
def test_what_is_no_json_object_is_400_everywhere(http: TestClient, method: str, path: str, raw: bytes) -> None:
    answer = http.request(method, path, content=raw, headers=JSON)
    assert answer.status_code == 400, answer.text
    assert "JSON" in answer.json()["error"]["message"]


def test_scorecards_are_bounded(http: TestClient) -> None:
    assert http.post(f"/v1/scorecards/{DIGEST}", json={"x": "y" * 2**16}).status_code == 413


def test_our_own_faults_are_500_in_the_shape_of_all_errors(http: TestClient, service: Any) -> None:
    service.registry.snapshot = None
    answer = http.get("/v1/adapters")
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "InternalServerError")


def test_answers_leave_out_what_does_not_apply(http: TestClient) -> None:
    base, adapter = http.get("/v1/models").json()["data"]
    assert base["fusion"] is None
    assert base["max_model_len"] == 2048
    assert not {"reason", "version"} & adapter["fusion"].keys()
    assert "max_model_len" not in adapter
    assert http.get("/v1/adapters").json()["data"][0].keys() == http.get("/v1/adapters/a").json().keys() - {"profiles"}


def test_the_docs_page_asks_nothing_of_other_sites(http: TestClient) -> None:
    page = http.get("/docs").text
    links = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert "openapi.json" in page
    assert http.get("/docs").headers["content-security-policy"] == "frame-ancestors 'none'"
    assert "://" not in re.sub(r"(?s)<!--.*?-->", "", page)
    for link in links:
        if not link.startswith("data:"):
            assert http.get(f"/{link.removeprefix('./')}").status_code == 200
    assert len(links) == 3


def test_the_docs_can_be_turned_off(service: Any) -> None:
    service.engine.args.disable_fastapi_docs = True
    front = Front()
    front.start(service)
    assert TestClient(front).get("/openapi.json").json()["info"]["title"] == "FastAPI"  # the tiny app's own
