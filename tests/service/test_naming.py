"""Every way of naming a fusion, on every route that takes a model, gives the same answer and headers."""

import json
import socket
from typing import Any

import httpx
import pytest

from tests.conftest import BASE_NAME, Server

RECIPE = "0.6*narrow + 0.4*wide"
AS_JSON: dict[str, Any] = {"adapters": [{"name": "wide", "weight": 0.4}, {"name": "narrow", "weight": 0.6}]}
MESSAGES = [{"role": "user", "content": "Name three rivers."}]
CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0, "logprobs": True}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "Name three rivers:", "max_tokens": 6, "temperature": 0},
    "/v1/responses": {"input": "Name three rivers.", "max_output_tokens": 6, "temperature": 0},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 6, "temperature": 0},
    "/tokenize": {"prompt": "Name three rivers."},
}


@pytest.fixture(scope="module")
def http(server: Server) -> Any:
    with server.http() as client:
        answer = client.put("/v1/fusions/even", json={"fusion": RECIPE})
        assert answer.status_code == 201, answer.text
        yield client
        assert client.delete("/v1/fusions/even").status_code == 204


def generated(response: httpx.Response) -> str:
    """The part of an answer that depends on the model's weights."""
    body = response.json()
    if "choices" in body:
        choice = body["choices"][0]
        return json.dumps(choice.get("message", choice).get("content") or choice.get("text"))
    if "output" in body:
        return json.dumps([part["text"] for o in body["output"] for part in o.get("content", [])])
    return json.dumps(body.get("content", body.get("tokens")))


@pytest.mark.parametrize("route", ROUTES)
def test_all_spellings_are_one_fusion(http: httpx.Client, route: str) -> None:
    spellings: list[dict[str, Any]] = [
        {"model": "even"},
        {"model": "even@1"},
        {"model": RECIPE},
        {"model": "4e-1*wide+.6*narrow"},
        {"model": BASE_NAME, "fusion": "even"},
        {"model": BASE_NAME, "fusion": RECIPE},
        {"model": BASE_NAME, "fusion": AS_JSON},
    ]
    answers = [http.post(route, json={**ROUTES[route], **spelling}) for spelling in spellings]
    for spelling, answer in zip(spellings, answers, strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-fusion-mode"] == "mixed"
        assert answer.headers["x-fusion-error"] == "0"
        if "model" in answer.json():
            assert answer.json()["model"] == spelling["model"]
    assert len({a.headers["x-fusion-digest"] for a in answers}) == 1
    assert len({a.headers["x-fusion-recipe"] for a in answers}) == 1
    assert len({generated(a) for a in answers}) == 1


def test_the_plain_base_has_no_fusion_headers(http: httpx.Client) -> None:
    for body in ({"model": BASE_NAME}, {"model": BASE_NAME, "fusion": None}):
        answer = http.post("/v1/chat/completions", json={**CHAT, **body})
        assert answer.status_code == 200
        assert not [key for key in answer.headers if key.startswith("x-fusion")]


def test_a_request_in_the_same_packet_as_a_fusion_gets_the_plain_base(http: httpx.Client, server: Server) -> None:
    address = httpx.URL(server.url)
    bodies = [json.dumps({**CHAT, "model": model}).encode() for model in ("-6*wide", BASE_NAME)]
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nconnection: {}\r\n"
    )
    sent = [
        (head.format(then) + f"content-length: {len(body)}\r\n\r\n").encode() + body
        for then, body in zip(("keep-alive", "close"), bodies, strict=True)
    ]
    with socket.create_connection((address.host, address.port or 80), timeout=300) as connection:
        connection.sendall(b"".join(sent))
        said = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    first, second = (part.partition("\r\n\r\n") for part in said.split("HTTP/1.1 200 OK")[1:])
    assert "x-fusion-mode" in first[0]
    assert "x-fusion-mode" not in second[0]
    fused, plain = (http.post("/v1/chat/completions", json={**CHAT, "model": m}) for m in ("-6*wide", BASE_NAME))
    assert generated(httpx.Response(200, text=first[2])) == generated(fused)
    assert generated(httpx.Response(200, text=second[2])) == generated(plain) != generated(fused)


@pytest.mark.parametrize("model", ["even", RECIPE, "wide", "svd(1*wide + 1*narrow, rank=4)"])
def test_every_streamed_chunk_echoes_the_model_as_typed(http: httpx.Client, model: str) -> None:
    with http.stream("POST", "/v1/chat/completions", json={**CHAT, "model": model, "stream": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    assert {json.loads(line)["model"] for line in lines[:-1]} == {model}
    assert answer.headers["x-fusion-mode"] == ("built" if model.startswith("svd") else "mixed")


def test_several_answers_to_one_prompt_share_the_mix(http: httpx.Client) -> None:
    one = http.post("/v1/chat/completions", json={**CHAT, "model": RECIPE}).json()["choices"][0]
    body = {**CHAT, "model": RECIPE, "n": 3, "temperature": 1, "top_k": 1}  # n needs sampling
    three = http.post("/v1/chat/completions", json=body).json()["choices"]
    assert [choice["message"]["content"] for choice in three] == [one["message"]["content"]] * 3


def test_no_model_beside_a_fusion_means_the_base(http: httpx.Client) -> None:
    for body in ({"fusion": RECIPE}, {"fusion": RECIPE, "model": None}):
        answer = http.post("/v1/chat/completions", json={**CHAT, **body})
        assert (answer.status_code, answer.json()["model"]) == (200, BASE_NAME)


def test_an_adapter_by_name_equals_its_unit_recipe(http: httpx.Client) -> None:
    one, other = (http.post("/v1/chat/completions", json={**CHAT, "model": m}) for m in ("wide", "1*wide"))
    assert one.json()["choices"] == other.json()["choices"]
    assert one.headers["x-fusion-digest"] == other.headers["x-fusion-digest"]


def test_models_lists_base_adapters_profiles_without_paths(http: httpx.Client, server: Server) -> None:
    text = http.get("/v1/models").text
    data = json.loads(text)["data"]
    assert [m["id"] for m in data] == [BASE_NAME, *sorted(server.adapters), "even"]
    assert data[0]["fusion"] is None
    assert data[-1]["fusion"]["recipe"] == "0.6*narrow + 0.4*wide"
    assert "/" not in "".join(str(m) for m in data)
    assert "~mix" not in text


def test_the_source_header_says_where_a_fusion_came_from(http: httpx.Client) -> None:
    model = "svd(0.5*wide + 0.5*stable, rank=3)"
    first, second = (http.post("/v1/chat/completions", json={**CHAT, "model": model}) for _ in "ab")
    assert [a.headers["x-fusion-source"] for a in (first, second)] == ["built", "warm"]
    assert float(first.headers["x-fusion-error"]) > 0
    assert first.headers["x-fusion-rank"] == "3"
    assert first.json()["choices"] == second.json()["choices"]
