"""A policy and receipts on the real server: refusals, plans, and receipts of answers, streams and gates."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.policy_rules import read_rules
from service.receipt_cli import check
from service.receipt_keys import read_key
from tests.conftest import ROOT, Server

ASK = {"messages": [{"role": "user", "content": "Name three rivers."}], "max_tokens": 4, "temperature": 0}
GATED = "gate(1*task + 0.4*safety, by=policy-gate, safety in 0.2..0.8)"


@pytest.fixture
def http(small_server: Server) -> Iterator[httpx.Client]:
    names = {"kept-apart": "safety", "policy-gate": "risk"}
    with small_server.http() as http:
        for name, folder in names.items():
            body = {"name": name, "path": str(ROOT / "examples/adapters" / folder)}
            assert http.post("/v1/adapters", json=body).status_code == 201
        yield http
        for name in names:
            http.delete(f"/v1/adapters/{name}")


def read(small_server: Server, answer: httpx.Response) -> dict[str, Any]:
    """The receipt of an answer, verified as anybody could."""
    folder = small_server.data.parent
    content = read_key(folder / "receipts.pem.pub").verify(answer.headers["x-fusion-receipt"])
    request = folder / "request.json"
    request.write_bytes(answer.request.content)
    checks = list(check(content, request, str(folder / "policy.toml")))
    assert all(holds for _, holds, _ in checks), checks
    return content


def test_what_is_kept_apart_is_refused_everywhere_and_planned_as_such(http: httpx.Client) -> None:
    # `kept-apart` has the content of `safety`: by both names it is the same.
    for recipe in ("0.6*task + 0.4*kept-apart", "0.6*task + 0.4*safety", "svd(1*task + 1*safety, rank=4)"):
        asked = http.post("/v1/chat/completions", json={**ASK, "model": recipe})
        put = http.put("/v1/fusions/apart", json={"fusion": recipe})
        for answer in (asked, put):
            assert (answer.status_code, "rule 'kept-apart' refuses" in answer.text) == (403, True), answer.text
        verdict = http.post("/v1/fusions/plan", json={"fusion": recipe}).json()["policy"]
        assert (verdict["allowed"], verdict["rule"]) == (False, "kept-apart")
    http.delete("/v1/adapters/kept-apart")
    assert http.post("/v1/chat/completions", json={**ASK, "model": "0.6*task + 0.4*safety"}).status_code == 200
    assert http.post("/v1/fusions/plan", json={"fusion": "1*task"}).json()["policy"]["allowed"]


def test_the_policy_is_shown_with_what_its_names_stand_for(http: httpx.Client, small_server: Server) -> None:
    shown = http.get("/v1/policy").json()
    assert shown["id"] == read_rules(str(small_server.data.parent / "policy.toml")).digest()
    assert [(rule["id"], rule["kind"]) for rule in shown["rules"]] == [("kept-apart", "apart")]
    assert shown["adapters"]["task"] == http.get("/v1/adapters/task").json()["digest"]
    assert shown["warnings"] == []


def test_a_name_that_no_adapter_has_is_told_at_start_and_by_the_policy(
    http: httpx.Client, small_server: Server
) -> None:
    http.delete("/v1/adapters/kept-apart")
    (warning,) = http.get("/v1/policy").json()["warnings"]
    assert warning.startswith(
        "no public adapter has the name 'kept-apart', which is in the policy's rules 'kept-apart'"
    )
    assert warning in small_server.log.read_text(), "the server began without it"


@pytest.mark.parametrize("stream", [False, True])
def test_answers_and_streams_have_receipts(http: httpx.Client, small_server: Server, stream: bool) -> None:
    body = {**ASK, "model": "0.5*task", "stream": stream, "receipt": True}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    content = read(small_server, answer)
    assert (content["recipe"], content["digest"]) == ("0.5*task", answer.headers["x-fusion-digest"])
    assert (content["mode"], content["policy"]["rules"]) == ("mixed", ["kept-apart"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_receipt_has_the_weights_that_a_gate_chose(http: httpx.Client, small_server: Server, stream: bool) -> None:
    http.delete("/v1/adapters/kept-apart")
    body = {**ASK, "model": GATED, "stream": stream}
    answer = http.post("/v1/chat/completions", json=body, headers={"x-fusion-receipt": "true"})
    assert answer.status_code == 200, answer.text
    (chosen,) = read(small_server, answer)["weights"]
    assert chosen["default"] == ""
    assert 0.2 <= chosen["weights"]["safety"] <= 0.8
    assert f'"safety": {chosen["weights"]["safety"]}' in answer.headers["x-fusion-weights"]


def test_the_base_and_tokens_have_receipts(http: httpx.Client, small_server: Server) -> None:
    base = http.get("/v1/models").json()["data"][0]["id"]
    for path, body in (("/v1/completions", {"prompt": "A", "max_tokens": 1}), ("/tokenize", {"prompt": "A"})):
        answer = http.post(path, json={**body, "model": base, "receipt": True})
        content = read(small_server, answer)
        assert (content["base"], content["path"], "digest" in content) == (base, path, False)


def test_the_log_has_no_receipt_key(small_server: Server) -> None:
    secret = Path(small_server.data.parent / "receipts.pem").read_text().splitlines()[1]
    assert secret not in small_server.log.read_text()
