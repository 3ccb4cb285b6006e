"""What people's HTTP clients send, before the real server: each case with its number in the list of tried inputs."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import BASE_NAME, Server

JSON = {"content-type": "application/json"}
TURNS = [{"role": "user", "content": "Name three rivers."}]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": TURNS, "max_tokens": 1},
    "/v1/chat/completions/batch": {"messages": [TURNS, TURNS], "max_tokens": 1},
    "/v1/completions": {"prompt": "Rivers:", "max_tokens": 1},
    "/v1/responses": {"input": "Name three rivers.", "max_output_tokens": 1},
    "/v1/messages": {"messages": TURNS, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": TURNS},
    "/tokenize": {"messages": TURNS},
}


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def refusal(answer: httpx.Response, status: int = 400) -> str:
    """The message of an error of this status."""
    assert answer.status_code == status, answer.text
    return str(answer.json()["error"]["message"])


@pytest.mark.parametrize("model", ["wide", BASE_NAME, "0.6*wide + 0.4*stable"])
def test_invocations_are_no_route(http: httpx.Client, model: str) -> None:  # C1
    headers = {"x-amzn-sagemaker-adapter-identifier": "wide"}
    for body in ROUTES.values():
        assert "/invocations" in refusal(http.post("/invocations", json={"model": model, **body}, headers=headers), 404)
    chat = {"model": BASE_NAME, **ROUTES["/v1/chat/completions"]}
    answer = http.post("/v1/chat/completions", json=chat, headers=headers)
    assert (answer.json()["model"], "x-fusion-mode" in answer.headers) == (BASE_NAME, False)


HALVES = [  # C5, C6
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a \ud83d"}]}, "'messages.0.content'"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ude00"}]}]}, "text"),
    ("/v1/chat/completions", {"stop": "\ud83d"}, "'stop'"),
    ("/v1/chat/completions", {"stop": ["a", "\ud83d"]}, "'stop.1'"),
    ("/v1/chat/completions", {"model": "wid\ud83d"}, "'model'"),
    ("/v1/chat/completions", {"fusion": "\ud83d"}, "'fusion'"),
    ("/v1/chat/completions", {"user": "\ude00\ud83d"}, "'user'"),
    ("/v1/chat/completions", {"metadata": {"\ud83d": "x"}}, "'metadata."),
    ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": "\ud83d"}]]}, "'messages.0.0.content'"),
    ("/v1/completions", {"prompt": ["a", "\ud83d"]}, "'prompt.1'"),
    ("/v1/completions", {"suffix": "\ud83d"}, "'suffix'"),
    ("/v1/responses", {"input": "\ud83d"}, "'input'"),
    ("/v1/responses", {"instructions": "\ud83d"}, "'instructions'"),
    ("/v1/messages", {"system": "\ud83d"}, "'system'"),
    ("/v1/messages", {"stop_sequences": ["\ud83d"]}, "'stop_sequences.0'"),
    ("/tokenize", {"messages": [{"role": "user", "content": "\ud83d"}]}, "'messages.0.content'"),
    ("/detokenize", {"tokens": ["\ud83d"]}, "'tokens.0'"),
    ("/v1/fusions/plan", {"fusion": "\ud83d"}, "'fusion'"),
    ("/v1/adapters", {"name": "\ud83d", "path": "x"}, "'name'"),
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "\ud83d"}, "'lora_path'"),
]


@pytest.mark.parametrize(("path", "extra", "place"), HALVES)
@pytest.mark.parametrize("model", [BASE_NAME, "wide"])
def test_half_a_character_is_named_where_it_stands(
    http: httpx.Client, path: str, extra: dict[str, Any], place: str, model: str
) -> None:
    body = {"model": model, **ROUTES.get(path, {}), **extra}
    message = refusal(http.post(path, content=json.dumps(body), headers=JSON))
    assert "half a character, '\\ud" in message
    assert place in message


def test_whole_characters_written_as_two_escapes_are_read(http: httpx.Client) -> None:
    body = {"model": BASE_NAME, "prompt": "\U0001f600", "add_special_tokens": False}
    counts = [
        http.post("/tokenize", content=json.dumps(body, ensure_ascii=is_ascii), headers=JSON).json()["count"]
        for is_ascii in (True, False)
    ]
    assert counts[0] == counts[1] > 0


SLASHES = [  # C9
    ("GET", "/v1/models/", "../models"),
    ("GET", "/v1/adapters/?limit=1", "../adapters?limit=1"),
    ("GET", "/v1/models/0.5*wide%20+%201*stable/", "../0.5*wide%20+%201*stable"),
    ("GET", "/v1/fusions/x/", "../x"),
    ("POST", "/v1/chat/completions/", "../completions"),
    ("POST", "/tokenize/", "../tokenize"),
    ("DELETE", "/v1/adapters/none/", "../none"),
    ("GET", "/health/", "../health"),
    ("HEAD", "/v1/models/", "../models"),
    ("GET", "/docs/", "../docs"),
]


@pytest.mark.parametrize(("method", "path", "place"), SLASHES)
def test_a_final_slash_leads_to_the_route_without(http: httpx.Client, method: str, path: str, place: str) -> None:
    answer = http.request(method, path, headers=JSON, content=b"{}" if method == "POST" else None)
    assert (answer.status_code, answer.headers["location"]) == (307, place)
    if method != "HEAD":
        assert "ends in a slash; use '/" in answer.json()["error"]["message"]
    without = path.replace("/?", "?").removesuffix("/")
    assert answer.next_request is not None
    assert answer.next_request.url == http.build_request(method, without).url


def test_a_client_that_follows_gets_its_answer(http: httpx.Client) -> None:
    body = {"model": "wide", "temperature": 0, **ROUTES["/v1/chat/completions"]}
    direct = http.post("/v1/chat/completions", json=body)
    followed = http.post("/v1/chat/completions/", json=body, follow_redirects=True)
    assert followed.json()["choices"] == direct.json()["choices"]
    assert followed.headers["x-fusion-digest"] == direct.headers["x-fusion-digest"]
    assert http.get("/v1/models/", follow_redirects=True).json() == http.get("/v1/models").json()


@pytest.mark.parametrize("path", ["/nowhere/", "/metrics/", "/livez/", "/v1//", "/invocations/", "/docs/assets/"])
def test_a_final_slash_opens_nothing(http: httpx.Client, path: str) -> None:
    refusal(http.get(path), 404)


def test_an_upload_with_a_final_slash_is_told_so(http: httpx.Client) -> None:
    answer = http.post("/v1/adapters/", files={"file": b"x"}, headers={"X-Fusion-Upload": "1"})
    assert "without a final slash" in refusal(answer, 415)


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/livez", "/readyz", "/v1/models", "/docs"])
def test_head_is_answered_where_get_is(http: httpx.Client, path: str) -> None:  # C15
    answer = http.head(path)
    assert (answer.status_code, answer.content) == (200, b"")


def test_the_description_of_the_tokenizer_has_its_flag(http: httpx.Client, small_server: Server) -> None:  # C13
    assert "--enable-tokenizer-info-endpoint" in refusal(http.get("/tokenizer_info"), 404)
    with small_server.http() as other:
        answer = other.get("/tokenizer_info")
        assert answer.json()["eos_token"] == "<|im_end|>"
        assert "message" in answer.json()["chat_template"]
        assert not [value for value in answer.json().values() if str(value).startswith("/")]
        assert "name_or_path" not in answer.json()
