"""Clients that ask for much and read nothing, on a real server: the others are answered in time."""

import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from tests.conftest import BASE_NAME, Server

WAIT_S, PLACES = 3, 4
"""Of `small_server`."""
SLACK_S = 10
"""What an answer may take besides the wait, on a busy machine; on the attacked version there was none in minutes."""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address")


def recipe(first: int) -> str:
    return f"svd(0.{first}*task + 0.5*safety, rank=8)"


def send_unread(server: Server, source: str, model: str) -> socket.socket:
    """A connection from `source` that has asked for a long answer and reads nothing of it."""
    address = httpx.URL(server.url)
    body = {
        "model": model,
        "prompt": "A",
        "max_tokens": 1500,
        "n": 2,
        "logprobs": 5,
        "stream": True,
        "ignore_eos": True,
    }
    raw = json.dumps(body).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.bind((source, 0))
    connection.connect((address.host, address.port or 80))
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
    return connection


@contextmanager
def connect(server: Server, source: str) -> Iterator[httpx.Client]:
    """A client with an address of its own."""
    transport = httpx.HTTPTransport(local_address=source)
    with httpx.Client(base_url=server.url, timeout=120, transport=transport) as http:
        yield http


def count(http: httpx.Client, series: str) -> float:
    return sum(
        float(n) for n in re.findall(rf"^{series}(?:{{[^}}]*}})? (\S+)$", http.get("/metrics").text, re.MULTILINE)
    )


def wait_for(http: httpx.Client, series: str, value: float) -> None:
    deadline = time.monotonic() + 60
    while (now := count(http, series)) != value:
        assert time.monotonic() < deadline, f"{series} is {now}, expected {value}"
        time.sleep(0.1)


def check(answer: httpx.Response, *expected: int) -> None:
    assert answer.status_code in expected, answer.text
    if answer.status_code in (429, 503):
        assert int(answer.headers["retry-after"]) > 0
    assert answer.elapsed.total_seconds() < WAIT_S + SLACK_S


def ask(http: httpx.Client, model: str) -> httpx.Response:
    return http.post("/v1/completions", json={"model": model, "prompt": "A", "max_tokens": 2})


@pytest.fixture
def readers(small_server: Server) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_readers_who_do_not_read_keep_nobody_out(small_server: Server, readers: ExitStack) -> None:
    with connect(small_server, "127.0.0.1") as one, connect(small_server, "127.0.0.3") as other:
        check(other.post("/v1/adapters", json={"name": "spare", "path": "shipped:task"}), 201)
        for i in range(PLACES):  # one client may have three of the four
            source = "127.0.0.1" if i < PLACES - 1 else "127.0.0.2"
            readers.enter_context(send_unread(small_server, source, recipe(21 + i)))
        deadline = time.monotonic() + WAIT_S  # the first are cut off when that time is over
        while count(other, "fusion_stack_requests") < PLACES - 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        answers: dict[str, Any] = {
            "own": ask(one, recipe(31)),
            "recipe": ask(other, recipe(32)),
            "put": other.put("/v1/fusions/squeezed", json={"fusion": recipe(33)}),
            "delete": other.delete("/v1/fusions/nobody"),
            "remove": other.delete("/v1/adapters/spare"),
            "plan": other.post("/v1/fusions/plan", json={"fusion": recipe(34)}),
            "base": ask(other, BASE_NAME),
            "live": other.get("/livez"),
        }
        check(answers["own"], 429, 200)
        for name in ("recipe", "put"):  # 200 when the server has ended a reader by then
            check(answers[name], 503, 200, 201)
        check(answers["delete"], 404)
        check(answers["remove"], 204)
        for name in ("plan", "base", "live"):
            check(answers[name], 200)
        assert count(other, "fusion_waiting_requests") == 0
        readers.close()
        wait_for(other, "fusion_stack_requests", 0)
        for i in range(2 * PLACES):
            check(ask(other, recipe(31 + i)), 200)
        wait_for(other, "vllm:num_requests_running", 0)  # vLLM sets it in its steps only
        check(other.put("/v1/fusions/squeezed", json={"fusion": recipe(33)}), 200, 201)
        check(other.delete("/v1/fusions/squeezed"), 204)


def test_an_export_that_nobody_reads_leaves_no_files(small_server: Server) -> None:
    address = httpx.URL(small_server.url)
    with connect(small_server, "127.0.0.1") as http:
        check(http.put("/v1/fusions/shipped", json={"fusion": "1*task + 1*safety"}), 201)
        for _ in range(10):  # two more than there may be at once
            with socket.create_connection((address.host, address.port or 80)) as connection:
                connection.sendall(b"GET /v1/fusions/shipped/export HTTP/1.1\r\nhost: localhost\r\n\r\n")
                assert connection.recv(15) == b"HTTP/1.1 200 OK"
        whole = http.get("/v1/fusions/shipped/export")
        assert len(whole.content) == int(whole.headers["content-length"]) > 10**6
        check(http.delete("/v1/fusions/shipped"), 204)
    names = {path.name for path in small_server.data.iterdir()}
    assert not [name for name in names if name.startswith(("export", "upload", "tmp"))]
