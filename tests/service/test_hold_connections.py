"""Attacks on the connections of a real server: it goes on answering, and keeps nothing of what was sent."""

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.conftest import BASE_NAME, Server

SLACK_S = 10.0
"""How much later than its limit an attack may be over on a busy machine."""
CLIENT_TIMEOUT_S, MAX_REQUESTS = 3, 32
"""The small server's."""
BODY = {"model": "0.6*task + 0.4*safety", "prompt": "Hello", "max_tokens": 1, "temperature": 0}


@pytest.fixture
def honest(small_server: Server) -> Iterator[httpx.Client]:
    """A client that is answered during and after the attack."""
    with httpx.Client(base_url=small_server.url, timeout=SLACK_S) as client:
        yield client
    with httpx.Client(base_url=small_server.url, timeout=60) as client:
        wait_idle(client)
        assert client.post("/v1/completions", json=BODY).status_code == 200


def connect(server: Server, *parts: bytes, receive_buffer: int | None = None) -> socket.socket:
    address = urlsplit(server.url)
    peer = socket.socket()
    if receive_buffer is not None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    peer.settimeout(CLIENT_TIMEOUT_S + SLACK_S)
    peer.connect((address.hostname, address.port))
    for part in parts:
        peer.sendall(part)
    return peer


def read_all(peer: socket.socket) -> bytes:
    """Everything until the server closes; TimeoutError when it does not."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := peer.recv(2**16):
            data += part
    return data


def head(path: str, framing: str) -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{framing}\r\n\r\n".encode()


def read_gauge(client: httpx.Client, name: str) -> float:
    """The sum of a gauge's series."""
    text = client.get("/metrics").text
    return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.M))


def wait_idle(client: httpx.Client) -> None:
    deadline = time.monotonic() + CLIENT_TIMEOUT_S + SLACK_S
    while gauges := [g for g in ("vllm:num_requests_running", "fusion_stack_requests") if read_gauge(client, g)]:
        assert time.monotonic() < deadline, f"{gauges} stay up"
        time.sleep(0.3)


def resident_bytes(server: Server) -> int:
    """Of the server's process and all below it."""
    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    return sum(process.memory_info().rss for process in processes if process.is_running())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/adapters", "/livez", "/metrics", "/no/such/path"])
def test_a_huge_length_is_refused_at_once(small_server: Server, honest: httpx.Client, path: str) -> None:
    start = time.monotonic()
    with connect(small_server, head(path, f"content-length: {10**18}")) as peer:
        assert peer.recv(12) == b"HTTP/1.1 413"
        read_all(peer)
    assert time.monotonic() - start < SLACK_S


def test_a_body_without_end_takes_no_memory(small_server: Server, honest: httpx.Client) -> None:
    before = resident_bytes(small_server)
    sent, part = 0, b"100000\r\n" + bytes(2**20) + b"\r\n"
    for _ in range(20):
        with (
            connect(small_server, head("/v1/chat/completions", "transfer-encoding: chunked")) as peer,
            contextlib.suppress(ConnectionError),
        ):
            for _ in range(64):
                peer.sendall(part)
                sent += 2**20
    assert sent < 20 * 64 * 2**20
    assert resident_bytes(small_server) - before < 64 * 2**20


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-slow: ",
        head("/v1/completions", "content-length: 1000") + b'{"model": "',
        head("/livez", "transfer-encoding: chunked"),
    ],
    ids=["nothing", "head", "body", "chunks"],
)
@pytest.mark.parametrize("drips", [False, True])
def test_a_slow_sender_is_cut_off(small_server: Server, honest: httpx.Client, start: bytes, drips: bool) -> None:
    began = time.monotonic()
    with connect(small_server, start) as peer, contextlib.suppress(ConnectionError):
        while drips and start and time.monotonic() - began < 2 * CLIENT_TIMEOUT_S + SLACK_S:
            peer.sendall(b"1" if b"chunked" not in start else b"1\r\nx\r\n")
            time.sleep(0.5)
        read_all(peer)
    assert time.monotonic() - began < 2 * CLIENT_TIMEOUT_S + SLACK_S


def test_a_client_that_does_not_read_loses_its_place(small_server: Server, honest: httpx.Client) -> None:
    # Over two minutes of generation, of which each part is sent at once.
    body = b'{"model": "0.3*task + 0.7*safety", "prompt": "Hello", "max_tokens": 1900, "n": 16, "stream": true,'
    body += b'"ignore_eos": true, "logprobs": 5}'
    request = head("/v1/completions", f"content-length: {len(body)}") + body
    with connect(small_server, request, receive_buffer=2048):
        deadline = time.monotonic() + SLACK_S
        while not read_gauge(honest, "fusion_stack_requests"):
            assert time.monotonic() < deadline, "the attack has not begun"
            time.sleep(0.1)
        wait_idle(honest)


def ask_at_once(server: Server, count: int, client: httpx.Client) -> tuple[list[bytes], float]:
    """The answers to as many equal requests, and the longest time that `/livez` took meanwhile, in seconds."""
    body = json.dumps({**BODY, "max_tokens": 16}).encode()
    request = head("/v1/completions", f"connection: close\r\ncontent-length: {len(body)}") + body
    answers: list[bytes] = []

    def ask() -> None:
        with connect(server, request) as peer:
            peer.settimeout(60)
            answers.append(read_all(peer))

    crowd = [threading.Thread(target=ask) for _ in range(count)]
    for thread in crowd:
        thread.start()
    slowest = 0.0
    while any(thread.is_alive() for thread in crowd):
        start = time.monotonic()
        assert client.get("/livez").status_code == 200
        slowest = max(slowest, time.monotonic() - start)
    return answers, slowest


def test_a_crowd_is_told_to_retry_and_nobody_hangs(small_server: Server, honest: httpx.Client) -> None:
    assert honest.post("/v1/completions", json=BODY).status_code == 200  # the stack is warm
    answers, slowest = ask_at_once(small_server, 200, honest)
    served = [json.loads(answer.partition(b"\r\n\r\n")[2]) for answer in answers if answer[9:12] == b"200"]
    refused = [answer for answer in answers if answer[9:12] == b"429"]
    closed = answers.count(b"")  # for one that came later
    assert len(answers) == len(served) + len(refused) + closed == 200
    assert len({answer["choices"][0]["text"] for answer in served}) == 1
    assert refused
    assert all(re.search(rb"\r\nretry-after: [1-9]", answer) and b'"code":429' in answer for answer in refused)
    assert slowest < SLACK_S / 2


@pytest.mark.parametrize(
    "start", [b"", b"POST /v1/completions HTTP/1.1\r\n", head("/v1/completions", "content-length: 9")]
)
def test_idle_connections_keep_nobody_out(small_server: Server, honest: httpx.Client, start: bytes) -> None:
    with contextlib.ExitStack() as peers:
        for _ in range(500):
            with contextlib.suppress(ConnectionError):
                peers.enter_context(connect(small_server, start))
        assert (
            honest.post("/v1/completions", json={"model": BASE_NAME, "prompt": "a", "max_tokens": 1}).status_code == 200
        )
        server = psutil.Process(small_server.process.pid)
        assert max(len(child.net_connections()) for child in server.children(recursive=True)) < 5 * MAX_REQUESTS
