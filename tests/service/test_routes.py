"""Adapters, profiles, plan, export and scorecards over HTTP."""

import io
import re
import tarfile
from pathlib import Path

import httpx
import pytest

from adapters import fuse, load, parse
from tests.conftest import Server

CHAT = {"messages": [{"role": "user", "content": "Name three rivers."}], "max_tokens": 4, "temperature": 0}

JSON = {"content-type": "application/json"}
UPLOAD = {"x-fusion-upload": "1"}


@pytest.fixture
def http(server: Server) -> httpx.Client:
    return server.http()


def test_profile_versions_switch_roll_back_and_stay_addressable(http: httpx.Client) -> None:
    one = http.put("/v1/fusions/turn", json={"fusion": "1*wide"})
    two = http.put("/v1/fusions/turn", json={"fusion": "-1*wide"})
    assert (one.status_code, two.status_code) == (201, 200)
    assert (one.json()["version"], two.json()["version"]) == (1, 2)

    def digest(model: str) -> str:
        return http.post("/v1/chat/completions", json={**CHAT, "model": model}).headers["x-fusion-digest"]

    assert digest("turn") == digest("turn@2") == two.json()["digest"]
    assert digest("turn@1") == one.json()["digest"]
    assert http.post("/v1/fusions/turn/rollback", json={"version": 1}).status_code == 200
    assert digest("turn") == one.json()["digest"]
    assert http.post("/v1/fusions/turn/rollback", json={"version": 9}).status_code == 404
    assert http.delete("/v1/adapters/wide").status_code == 409
    assert http.delete("/v1/fusions/turn").status_code == 204
    assert http.get("/v1/fusions/turn").status_code == 404


def test_defaults_apply_where_the_request_is_silent(http: httpx.Client) -> None:
    system = "You are terse."
    http.put("/v1/fusions/short", json={"fusion": "wide", "defaults": {"max_tokens": 2, "system": system}})
    body = {**CHAT, "model": "short"}
    del body["max_tokens"]
    usage = http.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["completion_tokens"] == 2
    assert http.post("/v1/chat/completions", json={**body, "max_tokens": 3}).json()["usage"]["completion_tokens"] == 3
    explicit = [{"role": "system", "content": system}, *CHAT["messages"]]  # type: ignore[misc]  # CHAT's values are of several types
    plain = http.post("/v1/chat/completions", json={**CHAT, "model": "wide", "messages": explicit})
    assert usage["prompt_tokens"] == plain.json()["usage"]["prompt_tokens"]
    own = {"model": "short", "input": [{"role": "system", "content": system}, *CHAT["messages"]]}  # type: ignore[misc]  # as above
    assert prompt_tokens(http.post("/v1/responses", json=own)) == usage["prompt_tokens"]
    null = {"model": "short", "input": "Name three rivers.", "instructions": None}
    assert prompt_tokens(http.post("/v1/responses", json=null)) == usage["prompt_tokens"]
    http.delete("/v1/fusions/short")


def prompt_tokens(answer: httpx.Response) -> int:
    """Tokens of the prompt, wherever a route says them."""
    assert answer.status_code == 200, answer.text
    body = answer.json()
    usage = body.get("usage", body)
    return next(int(usage[key]) for key in ("count", "prompt_tokens", "input_tokens") if key in usage)


def test_plan_says_mode_rank_and_error_without_building(http: httpx.Client) -> None:
    mixed = http.post("/v1/fusions/plan", json={"fusion": "0.6*narrow + 0.4*wide"}).json()
    built = http.post("/v1/fusions/plan", json={"fusion": "svd(1*wide + 1*pattern, rank=2)"}).json()
    assert (mixed["mode"], mixed["error"]) == ("mixed", 0)
    assert (built["mode"], built["rank"]) == ("built", 2)
    assert built["error"] > 0
    assert built["modules"]


def test_export_is_the_fused_adapter(http: httpx.Client, server: Server, tmp_path: Path) -> None:
    recipe = "0.25*narrow + -0.5*stable"
    http.put("/v1/fusions/out", json={"fusion": recipe})
    answer = http.get("/v1/fusions/out/export")
    assert answer.status_code == 200
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        archive.extractall(tmp_path, filter="data")
    exported = load(tmp_path / "adapter")
    parents = {name: load(path) for name, path in server.adapters.items()}
    expected, _ = fuse(parse(recipe), parents)
    for module in expected.modules:
        assert (exported.delta(module) - expected.delta(module)).abs().max() < 1e-6
    http.delete("/v1/fusions/out")


def test_scorecards_attach_to_the_digest(http: httpx.Client) -> None:
    digest = http.post("/v1/fusions/plan", json={"fusion": "0.1*wide"}).json()["digest"]
    card = {"benchmark": "orders", "exact": 0.5, "n": 100}
    assert http.post(f"/v1/scorecards/{digest}", json=card).status_code == 201
    data = http.get(f"/v1/scorecards/{digest}").json()["data"]
    assert data[-1].items() >= card.items()
    assert http.post("/v1/scorecards/xyz", json=card).status_code == 400


def test_an_upload_registers_and_is_removed(http: httpx.Client, server: Server) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(server.adapters["wide"], arcname="../../tricky")
    answer = http.post("/v1/adapters", data={"name": "sent"}, files={"file": buffer.getvalue()}, headers=UPLOAD)
    assert answer.status_code == 201, answer.text
    assert answer.json()["digest"] == http.get("/v1/adapters/wide").json()["digest"]
    assert http.delete("/v1/adapters/sent").status_code == 204
    assert http.post("/v1/chat/completions", json={**CHAT, "model": "wide"}).status_code == 200


def test_uploads_that_are_not_archives_are_refused(http: httpx.Client, server: Server) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(server.adapters["wide"], arcname="a")
    two = [("file", ("a", b"x")), ("file", ("b", b"y"))]
    for files, words in (
        ([("file", ("a.tar.gz", packed.getvalue()))], "uncompressed .tar archive"),
        ([("file", ("a.tar", b"x" * 2000))], "uncompressed .tar archive"),
        (two, "'file' is given twice"),
    ):
        answer = http.post("/v1/adapters", data={"name": "sent"}, files=files, headers=UPLOAD)
        assert answer.status_code == 400, answer.text
        assert words in answer.json()["error"]["message"]


def test_vllms_own_bodies_load_and_unload(http: httpx.Client, server: Server) -> None:
    path = str(server.adapters["narrow"])
    loaded = http.post("/v1/load_lora_adapter", json={"lora_name": "twin", "lora_path": path})
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'twin' added successfully.")
    assert http.post("/v1/chat/completions", json={**CHAT, "model": "twin"}).status_code == 200
    gone = http.post("/v1/unload_lora_adapter", json={"lora_name": "twin"})
    assert gone.status_code == 200
    assert http.post("/v1/chat/completions", json={**CHAT, "model": "twin"}).status_code == 404


def test_health_says_that_mixing_is_proven(http: httpx.Client) -> None:
    assert http.get("/livez").status_code == 200
    state = http.get("/readyz").json()
    assert state["ready"]
    assert state["mixing"]["proven"]


def test_metrics_name_profiles_and_never_weights(http: httpx.Client) -> None:
    for i in range(20):
        model = f"{i / 37!r}*wide + {i / 41!r}*narrow"
        http.post("/v1/completions", json={"model": model, "prompt": "A", "max_tokens": 1})
    text = http.get("/metrics").text
    assert 'fusion_requests_total{profile="(inline)",status="200"}' in text
    assert 'fusion_tokens_total{kind="completion",profile="(inline)"}' in text
    for series in ("fusion_builds_total", "fusion_load_seconds_count", "fusion_cache_lookups_total"):
        assert series in text
    assert "fusion_time_to_first_token_seconds_count" in text
    assert "~mix" not in text
    assert "0.027027" not in text


def test_every_route_of_the_served_document_answers(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/adapters/{name}", "/readyz"} <= paths.keys()
    for path, operations in paths.items():
        for method in operations:
            content = b"{}" if method in ("post", "put") else None
            answer = http.request(method, re.sub(r"{\w+}", "none", path), content=content, headers=JSON)
            assert answer.status_code != 405, (method, path)
            assert "No route has" not in answer.text, (method, path)


def test_the_docs_page_and_what_it_loads_are_served(http: httpx.Client) -> None:
    for path in ("/docs", "/docs/assets/swagger-ui-bundle.js", "/docs/assets/swagger-ui.css"):
        assert http.get(path).status_code == 200


def test_errors_have_openais_shape(http: httpx.Client) -> None:
    error = http.get("/v1/adapters/nothing").json()["error"]
    assert error["type"] == "NotFoundError"
    assert error["code"] == 404
