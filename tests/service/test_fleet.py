"""What routers before several replicas read and send, at a real server: docs/fleet.md."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import BASE_NAME, Server

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Name three rivers."}], "max_tokens": 1}
GREEDY = {"prompt": "The oak stool", "max_tokens": 2, "temperature": 0}
SYSTEM = {"role": "system", "content": "You are terse."}


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        made = client.put(
            "/v1/fusions/fleet", json={"fusion": "0.5*wide + 0.5*narrow", "defaults": {"system": SYSTEM["content"]}}
        )
        assert made.is_success, made.text
        yield client
        client.delete("/v1/fusions/fleet")


def test_one_stack_key_is_told_before_and_with_every_answer(http: httpx.Client) -> None:
    keys = {
        http.post("/v1/fusions/plan", json={"fusion": "fleet"}).json()["stack"],
        http.get("/v1/models/fleet").json()["fusion"]["stack"],
        *(
            http.post("/v1/chat/completions", json={**CHAT, "model": model}).headers["x-fusion-stack"]
            for model in ("fleet", "fleet@1", f"{BASE_NAME}:fleet", "0.1*narrow + 0.9*wide")
        ),
    }
    assert len(keys) == 1
    sent = {"x-session-id": keys.pop(), "x-request-id": "r-1"}
    answer = http.post("/v1/chat/completions", json={**CHAT, "model": "fleet"}, headers=sent)
    assert {name: answer.headers[name] for name in sent} == sent


def test_what_was_asked_for_is_listed_as_loaded(http: httpx.Client) -> None:
    assert http.post("/v1/chat/completions", json={**CHAT, "model": "fleet"}).is_success
    rows = [row for row in http.get("/metrics").text.splitlines() if row.startswith("vllm:lora_requests_info{")]
    assert len(rows) == 1, "vLLM's own row is not there"
    labels = dict(re.findall(r'(\w+)="([^"]*)"', rows[0]))
    names = labels["running_lora_adapters"].split(",")
    assert {"fleet", "wide", "narrow"} <= set(names)
    assert int(labels["max_lora"]) > len(names)
    assert "~" not in rows[0]


def test_a_render_has_the_tokens_that_an_answer_would_have(http: httpx.Client) -> None:
    rendered = http.post("/v1/chat/completions/render", json={**CHAT, "model": "fleet"})
    assert rendered.status_code == 200, rendered.text
    assert rendered.json()["model"] == "fleet"
    messages = [SYSTEM, *CHAT["messages"]]
    tokens = http.post("/tokenize", json={"model": "fleet", "messages": messages}).json()["tokens"]
    assert rendered.json()["token_ids"] == tokens
    assert "~" not in rendered.text
    body = {"model": "fleet", "prompt": "The oak stool", "max_tokens": 1}
    (plain,) = http.post("/v1/completions/render", json=body).json()
    assert (
        plain["token_ids"]
        == http.post("/tokenize", json={"model": "fleet", "prompt": "The oak stool"}).json()["tokens"]
    )
    unknown = http.post("/v1/chat/completions/render", json={**CHAT, "model": "nobody"})
    assert unknown.status_code == 404
    assert http.post("/v1/chat/completions/derender", json={}).status_code == 404


@pytest.mark.parametrize("name", [BASE_NAME, "fleet", "wide", "fleet@1"])
def test_every_form_of_a_name_is_answered_as_the_name(http: httpx.Client, name: str) -> None:
    def ask(model: str) -> tuple[str | None, str]:
        answer = http.post("/v1/completions", json={"model": model, **GREEDY})
        assert answer.status_code == 200, answer.text
        return answer.headers.get("x-fusion-digest"), answer.json()["choices"][0]["text"]

    assert len({ask(form) for form in (name, f"{BASE_NAME}:{name}", f"publishers/team/models/{name}")}) == 1
    assert http.get(f"/v1/models/publishers/team/models/{name}").status_code == 200


def test_models_say_their_parent(http: httpx.Client) -> None:
    cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
    assert (cards[BASE_NAME]["parent"], cards[BASE_NAME]["root"]) == (None, BASE_NAME)
    for name in ("fleet", "wide"):
        assert (cards[name]["parent"], cards[name]["root"]) == (BASE_NAME, name)
