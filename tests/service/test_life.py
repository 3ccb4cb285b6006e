"""Life under load: single builds, disconnects, unknown names, unloading while requests run."""

import gc
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.conftest import Server, family

CHAT = {"messages": [{"role": "user", "content": "Count to ten."}], "max_tokens": 2, "temperature": 0}


@pytest.fixture
def http(server: Server) -> Any:
    with server.http() as client:
        yield client


def metric(http: httpx.Client, series: str) -> float:
    """Value of a series written as in the exposition format; 0 when absent."""
    found = re.search(rf"^{re.escape(series)} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def leases(http: httpx.Client) -> float:
    return sum(metric(http, f'fusion_stack_requests{{kind="{kind}"}}') for kind in ("stack", "build"))


def wait_for_no_leases(http: httpx.Client) -> None:
    deadline = time.monotonic() + 60
    while leases(http) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert leases(http) == 0


def test_a_hundred_requests_for_one_new_recipe_make_one_build(server: Server, http: httpx.Client) -> None:
    series = 'fusion_builds_total{kind="build",outcome="built"}'
    before = metric(http, series)
    body = {**CHAT, "model": "svd(0.31*wide + 0.7*stable, rank=4)"}
    limits = httpx.Limits(max_connections=100)
    with (
        httpx.Client(base_url=server.url, timeout=300, limits=limits) as many,
        ThreadPoolExecutor(100) as pool,
    ):
        answers = list(pool.map(lambda _: many.post("/v1/chat/completions", json=body), range(100)))
    assert {a.status_code for a in answers} == {200}
    assert len({a.json()["choices"][0]["message"]["content"] for a in answers}) == 1
    assert metric(http, series) == before + 1


def test_clients_that_go_away_leave_nothing_hanging(server: Server, http: httpx.Client) -> None:
    stream = {**CHAT, "model": "0.9*wide", "max_tokens": 500, "stream": True, "ignore_eos": True}
    for _ in range(3):
        with server.http() as client, client.stream("POST", "/v1/chat/completions", json=stream) as answer:
            next(answer.iter_lines())
    for i in range(3):  # in the middle of a build
        body = {**CHAT, "model": f"svd(0.{i + 1}*wide + 0.5*pattern, rank=6)"}
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.02)
    wait_for_no_leases(http)

    def running() -> str:
        return "".join(line for line in http.get("/metrics").text.splitlines() if "num_requests_running{" in line)

    http.post(
        "/v1/chat/completions", json=CHAT | {"model": "wide"}
    ).raise_for_status()  # vLLM sets it in its steps only
    deadline = time.monotonic() + 5
    while not running().endswith(" 0.0") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running().endswith(" 0.0")


def test_a_thousand_unknown_names_leave_no_trace(server: Server, http: httpx.Client) -> None:
    for i in range(20):
        http.post("/v1/completions", json={"model": f"nobody{i}", "prompt": "A"})
    listed = http.get("/v1/models").text
    http.get("/v1/models/nobody"), http.get("/nobody")
    series = len(http.get("/metrics").text.splitlines())
    for i in range(1000):
        answer = http.post("/v1/completions", json={"model": f"unknown{i}", "prompt": "A"})
        assert answer.status_code == 404
    for i in range(50):
        assert http.get(f"/v1/models/unknown{i}").status_code == 404
        assert http.get(f"/unknown{i}").status_code == 404
    assert http.get("/v1/models").text == listed
    text = http.get("/metrics").text
    assert "unknown99" not in text
    assert len(text.splitlines()) == series


def test_adapters_come_and_go_while_requests_run(server: Server, http: httpx.Client) -> None:
    path = str(server.adapters["stable"])
    stream = {**CHAT, "model": "0.4*wide + 0.2*narrow", "max_tokens": 60, "stream": True, "ignore_eos": True}
    with server.http() as client, client.stream("POST", "/v1/chat/completions", json=stream) as answer:
        lines = answer.iter_lines()
        next(lines)
        for i in range(3):
            made = http.post("/v1/adapters", json={"name": f"guest{i}", "path": path})
            assert made.status_code == 201, made.text
            assert http.delete(f"/v1/adapters/guest{i}").status_code == 204
        rest = [line.removeprefix("data: ") for line in lines if line]
    assert rest[-1] == "[DONE]"
    finish = [json.loads(r)["choices"][0]["finish_reason"] for r in rest[:-1] if json.loads(r)["choices"]]
    assert finish[-1] == "length"


def test_more_builds_than_the_engine_holds_are_evicted_and_come_back(http: httpx.Client) -> None:
    def ask(i: int) -> httpx.Response:
        return http.post("/v1/chat/completions", json={**CHAT, "model": f"svd(0.{i + 10}*wide, rank=2)"})

    first = ask(0)
    for i in range(1, 18):
        assert ask(i).status_code == 200
    again = ask(0)
    assert again.headers["x-fusion-source"] == "loaded"
    assert again.json()["choices"] == first.json()["choices"]


def test_open_files_stay_flat(server: Server, http: httpx.Client) -> None:
    def open_files() -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family(server.process.pid))

    def ask(i: int) -> None:
        model = f"0.{i:03d}1*wide + 0.5*narrow"
        assert http.post("/v1/completions", json={"model": model, "prompt": "A", "max_tokens": 1}).is_success

    for i in range(10):
        ask(i)
    before = open_files()
    for i in range(10, 110):
        ask(i)
    gc.collect()
    assert open_files() <= before + 2


def test_a_shipped_adapter_is_registered_by_its_name_from_any_folder(http: httpx.Client) -> None:
    answer = http.post("/v1/adapters", json={"name": "ours", "path": "shipped:task"})
    assert answer.status_code == 201, answer.text
    assert http.post("/v1/chat/completions", json={**CHAT, "model": "0.5*ours"}).status_code == 200
    assert http.delete("/v1/adapters/ours").status_code == 204
    unknown = http.post("/v1/adapters", json={"name": "ours", "path": "shipped:tusk"})
    assert unknown.status_code == 400
    assert "shipped:risk, shipped:safety, shipped:task" in unknown.json()["error"]["message"]
