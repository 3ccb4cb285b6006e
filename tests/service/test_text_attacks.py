"""Texts of clients that stopped the service, or were answered 500: each is one client's 400, and others go on."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.conftest import BASE_NAME, Server
from tests.service.loop import watch_loop

TURNS = [{"role": "user", "content": "Name three rivers."}]
CHAT: dict[str, Any] = {"messages": TURNS, "max_tokens": 4, "temperature": 0}
ASKS: dict[str, dict[str, Any]] = {
    "/tokenize": {"messages": TURNS},
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "Name three rivers.", "max_output_tokens": 4},
    "/v1/messages": {"messages": TURNS, "max_tokens": 4},
}
TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LATER = TEMPLATE + "{% if 'go' in messages[-1]['content'] %}" + ENDLESS + "{% endif %}"
"""Ends when the profile is made, and not when it is used."""


def prompt_tokens(answer: httpx.Response) -> int:
    """Tokens of the prompt, wherever a route says them."""
    assert answer.status_code == 200, answer.text
    usage = answer.json().get("usage", answer.json())
    return next(int(usage[key]) for key in ("count", "prompt_tokens", "input_tokens") if key in usage)


def message(answer: httpx.Response, status: int) -> str:
    """The sentence of an error."""
    assert answer.status_code == status, answer.text
    return str(answer.json()["error"]["message"])


@contextmanager
def profile(server: Server, name: str, recipe: str, **defaults: Any) -> Iterator[httpx.Client]:
    """A profile with these defaults, while it is used."""
    with server.http() as client:
        made = client.put(f"/v1/fusions/{name}", json={"fusion": recipe, "defaults": defaults})
        assert made.status_code in (200, 201), made.text
        yield client
        client.delete(f"/v1/fusions/{name}")


def test_a_profile_s_chat_template_shapes_the_prompt_of_every_chat_route(small_server: Server) -> None:
    with profile(small_server, "shaped", "task", chat_template=TEMPLATE, system="Be brief.") as client:
        text = {"model": "task", "prompt": "<Be brief.><Name three rivers.>"}
        count = client.post("/tokenize", json=text).json()["count"]
        asked = {route: client.post(route, json={**ASKS[route], "model": "shaped"}) for route in ASKS}
        assert {route: prompt_tokens(answer) for route, answer in asked.items()} == dict.fromkeys(ASKS, count)
        assert prompt_tokens(client.post("/tokenize", json={**ASKS["/tokenize"], "model": "task"})) > count
        batch = {**CHAT, "messages": [TURNS, TURNS], "model": "shaped"}
        assert prompt_tokens(client.post("/v1/chat/completions/batch", json=batch)) == 2 * count
        untrusted = {**CHAT, "model": "task", "chat_template": TEMPLATE}
        assert client.post("/v1/chat/completions", json=untrusted).status_code == 400  # clients' own are not trusted


def test_a_template_gets_all_that_a_request_may_say(small_server: Server) -> None:
    template = (
        "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
        "|{{ style }}|{% if tools %}{{ tools[0].function.name }}{% endif %}|{{ add_generation_prompt }}"
        "|{% if documents %}{{ documents[0].title }}{% endif %}|{{ eos_token }}"
    )
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
    ask = {
        "model": "rich",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        "chat_template_kwargs": {"style": "plain", "documents": [{"title": "T", "text": "x"}], "unused": 1},
        "tools": [tool],
    }
    with profile(small_server, "rich", "task", chat_template=template) as client:
        tokens = client.post("/tokenize", json=ask).json()["tokens"]
        text = client.post("/detokenize", json={"model": BASE_NAME, "tokens": tokens}).json()["prompt"]
    assert text == "ab|plain|look_up|True|T|<|im_end|>"


@pytest.mark.parametrize(
    "template", [ENDLESS, "{{ '%0300000000d' % 1 }}", "{{ " + "(" * 20_000, "{% for", "{{ x.y.z }}"]
)
def test_a_template_that_never_ends_is_refused_and_nobody_waits(small_server: Server, template: str) -> None:
    with small_server.http() as client, watch_loop(small_server) as times:
        body = {"fusion": "task", "defaults": {"chat_template": template}}
        start = time.monotonic()
        assert "'defaults.chat_template'" in message(client.put("/v1/fusions/bad", json=body), 400)
        assert time.monotonic() - start < 30
        assert client.get("/v1/fusions/bad").status_code == 404
    assert max(times) < 3


def test_a_template_that_never_ends_for_some_request_is_that_request_s_error(small_server: Server) -> None:
    with profile(small_server, "later", "task", chat_template=LATER) as client, watch_loop(small_server) as times:
        endless = {**CHAT, "model": "later", "messages": [{"role": "user", "content": "go"}]}
        with ThreadPoolExecutor(8) as pool:
            bad = [pool.submit(client.post, "/v1/chat/completions", json=endless) for _ in range(8)]
            for model in ("task", BASE_NAME):
                start = time.monotonic()
                assert client.post("/v1/chat/completions", json={**CHAT, "model": model}).status_code == 200
                assert time.monotonic() - start < 20
            answers = [one.result() for one in bad]
        for answer in answers:
            assert answer.status_code == 400 or "retry-after" in answer.headers, answer.text
        assert "more than 1 s" in message(next(answer for answer in answers if answer.status_code == 400), 400)
        assert client.post("/v1/chat/completions", json={**CHAT, "model": "later"}).status_code == 200
    assert max(times) < 3


def test_clients_bring_no_template_unless_the_server_says_so(server: Server) -> None:
    with server.http() as client:
        answer = client.put("/v1/fusions/bad", json={"fusion": "wide", "defaults": {"chat_template": TEMPLATE}})
        assert "FUSION_CLIENT_TEMPLATES" in message(answer, 400)


ROLES: list[Any] = [{}, [], None, 7, True, {"role": {}}, ["system"]]


@pytest.mark.parametrize("route", ASKS)
def test_a_role_that_is_no_text_is_the_client_s_fault(server: Server, route: str) -> None:
    with profile(server, "spoken", "wide", system="Be brief.") as client:
        for role in ROLES:
            turns: list[Any] = [{"role": role, "content": "x"}, role]
            key = "input" if "responses" in route else "messages"
            message(client.post(route, json={**ASKS[route], "model": "spoken", key: turns}), 400)


def test_a_batch_of_conversations_has_the_profile_s_system_turn_in_each(server: Server) -> None:
    with profile(server, "spoken", "wide", system="Be brief.") as client:
        one = client.post("/v1/chat/completions", json={**CHAT, "model": "spoken"})
        batch = {**CHAT, "model": "spoken", "messages": [TURNS, TURNS]}
        both = client.post("/v1/chat/completions/batch", json=batch)
    assert prompt_tokens(both) == 2 * prompt_tokens(one)
    texts = [choice["message"]["content"] for choice in both.json()["choices"]]
    assert texts == [one.json()["choices"][0]["message"]["content"]] * 2


SURROGATES: list[dict[str, Any]] = [
    {"stop": ["\ud800"]},
    {"bad_words": ["\ud800"]},
    {"vllm_xargs": {"a": "\ud800"}},
    {"messages": [{"role": "user", "content": "\udfff"}]},
    {"user": "\ud800"},
    {"tools": [{"type": "function", "function": {"name": "\ud800"}}], "tool_choice": "none"},
    {"structured_outputs": {"regex": "\ud800"}},
    {"chat_template_kwargs": {"a": "\ud800"}},
    {"\ud800": 1},
]


@pytest.mark.parametrize("extra", SURROGATES)
@pytest.mark.parametrize("model", [BASE_NAME, "wide"])
def test_half_a_character_is_the_client_s_fault(server: Server, model: str, extra: dict[str, Any]) -> None:
    with server.http() as client:
        content, json_type = json.dumps({**CHAT, "model": model, **extra}), {"content-type": "application/json"}
        answer = client.post("/v1/chat/completions", content=content, headers=json_type)
        assert "JSON" in message(answer, 400)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"request_id": "../../x\x00"}, "request_id"),
        ({"n": 4000}, "1024"),
        ({"use_beam_search": True, "length_penalty": -1e5}, "length_penalty"),
        ({"chat_template_kwargs": {"messages": []}}, "'messages' is not one"),
        ({"chat_template_kwargs": {"tokenize": True, "padding": "max_length", "max_length": 10**9}}, "is not one"),
        ({"stop": "a" * 100_000}, "65536"),
        ({"vllm_xargs": {"kv_transfer_params": "x"}}, "kv_transfer_params"),
        ({"vllm_xargs": {"ec_transfer_params": [1]}}, "ec_transfer_params"),
    ],
)
def test_what_has_no_bound_in_vllm_has_one_here(server: Server, extra: dict[str, Any], words: str) -> None:
    with server.http() as client:
        text = message(client.post("/v1/chat/completions", json={**CHAT, "model": BASE_NAME, **extra}), 400)
    assert words in text
    assert "keyword argument" not in text


CALL = {"name": "f", "arguments": "[" * 100_000}
DEEP: dict[str, dict[str, Any]] = {
    "/tokenize": {
        "messages": [*TURNS, {"role": "assistant", "tool_calls": [{"id": "x", "type": "function", "function": CALL}]}]
    },
    "/v1/responses": {"input": [*TURNS, {"type": "function_call", "call_id": "x", **CALL}]},
}
DEEP["/v1/chat/completions"] = DEEP["/tokenize"]


@pytest.mark.parametrize("route", DEEP)
def test_json_in_a_text_is_no_deeper_than_a_body(server: Server, route: str) -> None:
    with server.http() as client:
        assert "too deep" in message(client.post(route, json={"model": BASE_NAME, **DEEP[route]}), 400)


def test_an_id_of_the_client_is_answered_when_it_is_safe(server: Server) -> None:
    with server.http() as client:
        body = {**CHAT, "model": BASE_NAME}
        good = client.post("/v1/chat/completions", json=body, headers={"x-request-id": "trace-1.2"})
        assert good.json()["id"] == "chatcmpl-trace-1.2"
        bad = client.post("/v1/chat/completions", json=body, headers={"x-request-id": "<script>"})
        assert "x-request-id" in message(bad, 400).lower()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("PUT", "/v1/chat/completions", 405), ("POST", "/v1/nothing", 404)],
)
def test_errors_have_one_shape(server: Server, method: str, path: str, status: int) -> None:
    with server.http() as client:
        assert message(client.request(method, path, json={}), status)
