"""Limits on a real server: disconnects, errors and refusals leave nothing reserved, and answers tell what is left."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import BASE_NAME
from tests.service.access.conftest import LIMITED, TOKENS, Served

FULL = {"model": BASE_NAME, "prompt": "Count:", "max_tokens": 500, "ignore_eos": True}


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with served.client(LIMITED, "user") as http:
        yield http


def left(http: httpx.Client) -> tuple[int, int]:
    """Tokens that are left, as an answer tells that takes three; and the requests."""
    answer = http.post("/v1/completions", json={"model": BASE_NAME, "prompt": [1, 2], "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    headers = answer.headers
    assert headers["x-ratelimit-limit-tokens"] == str(TOKENS)
    return int(headers["x-ratelimit-remaining-tokens"]), int(headers["x-ratelimit-remaining-requests"])


def spent(http: httpx.Client, before: int) -> int:
    """Tokens that count since `before` were left, once all that was reserved has been settled."""
    end = time.monotonic() + 10
    while (now := left(http)[0]) < before - TOKENS // 4 and time.monotonic() < end:
        before -= 3
        time.sleep(0.2)
    return before - now - 3


def usage(answer: Any) -> int:
    return int(answer.json()["usage"]["total_tokens"])


def test_what_is_used_counts_and_nothing_else(http: httpx.Client) -> None:
    before, requests = left(http)
    answers = [
        http.post("/v1/completions", json={"model": "task", "prompt": "Say yes.", "max_tokens": 9, "n": 3}),
        http.post("/v1/completions", json={"prompt": ["one two", "three"], "max_tokens": 4}),
        http.post(
            "/v1/chat/completions",
            json={"model": "task", "messages": [{"role": "user", "content": "Hi"}]} | {"max_tokens": 5},
        ),
    ]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert spent(http, before) == sum(usage(answer) for answer in answers)
    assert requests - left(http)[1] == 5


@pytest.mark.parametrize("model", [BASE_NAME, "task"])
def test_a_client_that_leaves_pays_what_was_computed_for_it(http: httpx.Client, model: str) -> None:
    before, _ = left(http)
    body = FULL | {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) <= before - 500
        assert next(answer.iter_lines()).startswith("data: ")
    used = spent(http, before)
    assert 2 < used < 400


def test_an_answer_without_a_stream_whose_client_leaves_counts_too(http: httpx.Client) -> None:
    before, _ = left(http)
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=FULL, timeout=1.0)
    assert 0 < spent(http, before) < 400, "what it has computed, of which it has told nothing"


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_fit_is_a_429_or_a_400_before_it_begins(http: httpx.Client, stream: bool) -> None:
    before, _ = left(http)
    answer = http.post("/v1/completions", json=FULL | {"n": 4, "max_tokens": 1000, "stream": stream})
    assert answer.status_code == 400
    assert "this request alone may take 400" in answer.json()["error"]["message"]
    refused = http.post("/v1/completions", json=FULL | {"n": 5, "max_tokens": 590, "stream": stream})
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "RateLimitError"
    assert 0 < int(refused.headers["retry-after"]) <= 61
    wrong = http.post("/v1/completions", json=FULL | {"temperature": -1, "stream": stream})
    assert wrong.status_code == 400
    assert spent(http, before) == 0


def test_a_stream_s_events_come_as_they_are_made(http: httpx.Client) -> None:
    body = FULL | {"stream": True, "max_tokens": 40}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        times = [time.monotonic() for line in answer.iter_lines() if line.startswith("data: {")]
        assert answer.headers["x-ratelimit-reset-tokens"].endswith("s")
    assert times[-1] - times[0] > 0.01
    assert len(times) >= 20
