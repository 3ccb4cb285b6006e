"""A request is checked by all that vLLM checks before anything is made for it, and so are a profile's defaults."""

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import BASE_NAME, Server
from tests.service.test_http_inputs import ROUTES, TURNS, refusal

CHAT = "/v1/chat/completions"
numbers = itertools.count(1)


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def new_recipe() -> str:
    """A recipe that nobody has asked for, and that must be built."""
    return f"svd(0.6*wide + 0.{next(numbers):04}*stable, rank=3)"


def state(http: httpx.Client, recipe: str) -> str:
    return str(http.get(f"/v1/models/{recipe}").json()["fusion"]["state"])


BAD: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"temperature": -1}),
    (CHAT, {"temperature": "hot"}),
    (CHAT, {"top_p": 2}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": "x"}),
    (CHAT, {"messages": [{"role": {}, "content": "x"}]}),
    (CHAT, {"messages": [{"role": "user", "content": "x " * 4000}]}),
    (CHAT, {"logprobs": True, "top_logprobs": 10_000}),
    (CHAT, {"n": 0}),
    (CHAT, {"min_tokens": 9}),
    (CHAT, {"stop": [7]}),
    (CHAT, {"logit_bias": {"10000000": 1}}),
    (CHAT, {"stream_options": {"include_usage": True}}),
    (CHAT, {"tools": [{"type": "function"}]}),
    (CHAT, {"tool_choice": "auto", "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}),
    (CHAT, {"structured_outputs": {"regex": "("}}),
    (CHAT, {"structured_outputs": {"regex": "a" * 20_000}}),
    (CHAT, {"chat_template": "{{ x }}"}),
    (CHAT, {"stream": True, "temperature": -1}),
    (CHAT, {"stream": True, "structured_outputs": {"regex": "("}}),
    (CHAT, {"stream": True, "messages": [{"role": "user", "content": "x " * 4000}]}),
    ("/v1/chat/completions/batch", {"messages": [TURNS, []]}),
    ("/v1/completions", {"prompt": []}),
    ("/v1/completions", {"prompt": [10_000_000]}),
    ("/v1/completions", {"prompt": ["a", "x " * 4000]}),
    ("/v1/completions", {"logprobs": 10_000}),
    ("/v1/completions", {"stream": True, "logprobs": 10_000}),
    ("/v1/completions", {"max_tokens": -1}),
    ("/v1/responses", {"input": [{"role": "user"}]}),
    ("/v1/responses", {"max_output_tokens": 0}),
    ("/v1/responses", {"temperature": -1}),
    ("/v1/messages", {"max_tokens": None}),
    ("/v1/messages", {"temperature": "x"}),
    ("/tokenize", {"messages": [{"role": {}}]}),
]


@pytest.mark.parametrize(("path", "extra"), BAD)
def test_a_bad_request_makes_nothing(http: httpx.Client, path: str, extra: dict[str, Any]) -> None:
    recipe = new_recipe()
    body = {"model": recipe, **ROUTES[path], **extra}
    answer = http.post(path, json=body)
    refusal(answer, 404 if answer.status_code == 404 else 400)
    assert not [name for name in answer.headers if name.startswith("x-fusion")]
    assert state(http, recipe) == "evicted"
    # The reason is the one that the base gives, but for streams, which tell some of it in an event.
    base = http.post(path, json=body | {"model": BASE_NAME})
    if not body.get("stream") or base.status_code != 200:
        assert answer.json()["error"]["message"].replace(recipe, BASE_NAME) == base.json()["error"]["message"]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_good_request_is_answered_by_what_was_made_for_it(http: httpx.Client, path: str, is_streamed: bool) -> None:
    if is_streamed and ("batch" in path or "token" in path):
        pytest.skip("has no stream")
    recipe, usage = new_recipe(), "fusion_tokens_total"
    before = count(http, usage)
    with http.stream("POST", path, json={"model": recipe, **ROUTES[path], "stream": is_streamed}) as answer:
        text = answer.read().decode()
    assert (answer.status_code, answer.headers["x-fusion-source"]) == (200, "built"), text
    assert state(http, recipe) == "warm"
    if "token" not in path:
        assert text != "null"
        assert count(http, usage) - before < 200  # the dry run adds none


def count(http: httpx.Client, series: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(series))


def test_many_first_requests_at_once_are_all_answered(http: httpx.Client, server: Server) -> None:
    recipe, statuses = new_recipe(), list[int]()

    def ask(is_good: bool) -> None:
        extra = {} if is_good else {"temperature": -1}
        with server.http() as client:
            statuses.append(client.post(CHAT, json={"model": recipe, **ROUTES[CHAT], **extra}).status_code)

    threads = [threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] * 4 + [400] * 4


DEFAULTS: list[tuple[dict[str, Any], str, str]] = [  # D1
    ({"max_tokens": 10**9}, "defaults.max_tokens", "2048"),
    ({"temperature": 0.5, "max_tokens": 5000}, "defaults.max_tokens", "2048"),
    ({"system": "x " * 4000}, "defaults.system", "2048"),
    ({"stop": ["x"] * 5}, "defaults.stop", "at most"),
    ({"stop": ["x"] * 4, "system": "x", "temperature": 1.5, "top_p": 0.1, "max_tokens": 2000}, "", ""),
]


@pytest.mark.parametrize(("defaults", "param", "words"), DEFAULTS)
def test_defaults_are_what_the_routes_accept(
    http: httpx.Client, defaults: dict[str, Any], param: str, words: str
) -> None:
    answer = http.put("/v1/fusions/tried", json={"fusion": "wide", "defaults": defaults})
    http.delete("/v1/fusions/tried")
    if not param:  # what all routes accept
        assert answer.status_code == 201, answer.text
        return
    message = refusal(answer)
    assert (answer.json()["error"]["param"], repr(param) in message, words in message) == (param, True, True), message


TEMPLATES = [  # D1
    ("{{ unknown_function(messages) }}", "unknown_function"),
    ("{% if messages | length > 9 %}{{ unknown_function() }}{% endif %}x", "unknown_function"),
    ("{{ messages | no_such_filter }}", "no_such_filter"),
    ("{{ messages[1].content }}", "undefined|has no element|list"),
    ("{% if messages | length == 1 %}{{ raise_exception('never alone') }}{% endif %}x", "never alone"),
]


@pytest.mark.parametrize(("template", "words"), TEMPLATES)
def test_templates_that_render_no_plain_chat_are_refused(small_server: Server, template: str, words: str) -> None:
    with small_server.http() as http:
        body = {"fusion": "task", "defaults": {"chat_template": template}}
        message = refusal(http.put("/v1/fusions/tried", json=body))
        assert any(word in message for word in words.split("|")), message
        assert http.get("/v1/fusions/tried").status_code == 404


def test_a_template_that_takes_no_system_turn_is_fit_for_a_profile_without(small_server: Server) -> None:
    refuses = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = refuses + "<{{ m.content }}>{% endfor %}"
    with small_server.http() as http:
        body = {"fusion": "task", "defaults": {"chat_template": template, "system": "Be brief."}}
        answer = http.put("/v1/fusions/tried", json=body)
        assert "no system" in refusal(answer)
        del body["defaults"]["system"]  # type: ignore[attr-defined]  # a dict
        assert http.put("/v1/fusions/tried", json=body).status_code == 201
        asked = http.post(CHAT, json={"model": "tried", **ROUTES[CHAT]})
        http.delete("/v1/fusions/tried")
    assert asked.status_code == 200
