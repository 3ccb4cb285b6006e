"""Connections under uvicorn itself, without an engine: what one client may send, leave out or not read."""

import contextlib
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.edge import protocol
from service.edge.protocol import MAX_HEAD_BYTES, MAX_HEADERS, BoundedProtocol
from service.errors import RETRY_AFTER_S
from tests.service.edges import CHUNK, GET, LARGE, LAST, LIMITS, PROMPT_S, Edge, post, read_answer, run_edge


@pytest.fixture
def edge() -> Iterator[Edge]:
    with run_edge() as edge:
        yield edge


def error(answer: tuple[int, bytes]) -> tuple[int, str]:
    """Status and message of an error, whose shape and `connection: close` are checked."""
    status, data = answer
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    fields = json.loads(body)["error"]
    assert fields["code"] == status
    return status, fields["message"]


@pytest.mark.parametrize("length", [100_001, 10**18])
@pytest.mark.parametrize("method", ["POST", "GET", "DELETE", "HEAD"])
def test_a_length_over_the_limit_is_refused_before_the_body(edge: Edge, length: int, method: str) -> None:
    start = time.monotonic()
    head = post(length, "/echo", "expect: 100-continue").replace(b"POST", method.encode())
    status, data = edge.ask(head)
    assert (status, b"100 Continue" in data, edge.app.seen) == (413, False, [])
    assert time.monotonic() - start < PROMPT_S
    assert edge.ask(post(150_000), bytes(150_000))[0] == 413  # also to a client that sends on


def test_a_chunked_body_is_cut_at_the_limit_while_it_is_sent(edge: Edge) -> None:
    with edge.connect(post(None)) as peer:
        sent = 0
        with contextlib.suppress(ConnectionError, TimeoutError):
            while sent < 2**28:
                peer.sendall(b"10000\r\n" + CHUNK + b"\r\n")
                sent += len(CHUNK)
        assert sent < 2**28
    assert edge.app.seen == []


def test_a_body_of_the_largest_size_is_passed_on_whole(edge: Edge) -> None:
    assert edge.ask(post(100_000, "/echo", "connection: close"), bytes(100_000))[1].endswith(b"100000\r\n0\r\n\r\n")


def test_a_compressed_body_is_refused(edge: Edge) -> None:
    assert error(edge.ask(post(3, "/echo", "content-encoding: gzip"), b"abc"))[0] == 415


@pytest.mark.parametrize(
    ("sent", "part"),
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\n", "head"),
        (b"G", "head"),
        (b"\r\n", "head"),
        (post(10), "body"),
        (post(10) + b"abc", "body"),
    ],
)
def test_what_does_not_come_is_answered_408(edge: Edge, sent: bytes, part: str) -> None:
    assert error(edge.ask(sent)) == (408, f"The request's {part} did not come within 1 s (FUSION_CLIENT_TIMEOUT_S).")
    edge.wait_idle()


def test_a_connection_that_says_nothing_is_closed(edge: Edge) -> None:
    assert edge.ask() == (0, b"")


def test_a_server_that_stands_still_blames_no_client(edge: Edge) -> None:
    with (
        edge.connect(post(5, "/echo", "connection: close"), b"he") as peer,
        edge.connect(GET.replace(b"/ ", b"/stall ")),
    ):
        time.sleep(0.5)
        peer.sendall(b"llo")
        assert read_answer(peer)[0] == 200


@pytest.mark.parametrize(
    ("begin", "drip"),
    [(b"GET / HTTP/1.1\r\nh: ", b"x"), (GET, b"\r\n"), (post(1000), b"x")],
    ids=["head", "idle", "body"],
)
def test_what_drips_is_cut_off(edge: Edge, begin: bytes, drip: bytes) -> None:
    start = time.monotonic()
    with edge.connect(begin) as peer, contextlib.suppress(ConnectionError):
        while time.monotonic() - start < PROMPT_S:
            peer.sendall(drip)
            time.sleep(0.1)
    assert time.monotonic() - start < PROMPT_S
    edge.wait_idle()


def test_a_slow_but_steady_body_is_taken(edge: Edge) -> None:
    with edge.connect(post(12_000, "/echo", "connection: close")) as peer:
        for _ in range(30):
            peer.sendall(bytes(400))
            time.sleep(0.1)
        assert read_answer(peer)[1].endswith(b"12000\r\n0\r\n\r\n")


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\nh: ", post(None) + b"1\r\nx\r\n0\r\nh: ", post(None) + b"1;"])
def test_headers_trailers_and_extensions_without_end_are_refused(edge: Edge, start: bytes) -> None:
    with edge.connect(start) as peer:
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 2**26:
                peer.sendall(b"x" * 2**16)
                sent += 2**16
    assert sent < 100 * MAX_HEAD_BYTES


@pytest.mark.parametrize(
    "headers", [b"h: " + b"x" * MAX_HEAD_BYTES + b"\r\n", b"h: x\r\n" * (MAX_HEADERS + 1)], ids=["size", "number"]
)
def test_a_head_that_comes_at_once_has_the_same_limits(edge: Edge, headers: bytes) -> None:
    assert error(edge.ask(GET[:-2] + headers + b"\r\n"))[0] == 431
    assert edge.app.seen == []


def test_trailers_never_reach_the_headers(edge: Edge) -> None:
    request = post(None, "/echo", "connection: close") + b"1\r\nx\r\n0\r\nhost: other\r\n\r\n"
    assert edge.ask(request)[1].endswith(b"1\r\n0\r\n\r\n")
    assert [value for name, value in edge.app.headers if name == b"host"] == [b"x"]


def test_requests_ahead_of_the_answers_are_bounded(edge: Edge) -> None:
    assert edge.ask(GET * 10 + LAST)[1].count(b"200 OK") == 11
    with edge.connect(GET * 20_000) as peer:
        read_answer(peer)
    assert len(edge.app.seen) < 11 + 20


def test_a_client_that_does_not_read_is_cut_off(edge: Edge) -> None:
    with edge.connect(GET.replace(b"/ ", b"/flood ")):
        time.sleep(0.5)
        assert edge.app.running == 1
        edge.wait_idle()


@pytest.mark.parametrize(("path", "size"), [("/v1/adapters", 300_000), ("/echo", 100_000)])
def test_an_upload_must_come_faster_than_other_bodies(edge: Edge, path: str, size: int) -> None:
    kind = "content-type: multipart/form-data; boundary=x"
    start = time.monotonic()
    with edge.connect(post(size, path, kind)) as peer, contextlib.suppress(ConnectionError):
        while time.monotonic() - start < 3.5 * LIMITS.client_timeout_s:
            peer.sendall(bytes(2000))
            time.sleep(0.1)
    assert (time.monotonic() - start < 3.5 * LIMITS.client_timeout_s) == (path == "/v1/adapters")


def test_a_connection_that_cannot_be_checked_stops_no_check(
    edge: Edge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check = BoundedProtocol.check

    def fail(self: BoundedProtocol, now: float) -> None:
        if self.running is not None:
            raise RuntimeError("a fault")
        check(self, now)

    monkeypatch.setattr(BoundedProtocol, "check", fail)
    with edge.connect(GET.replace(b"/ ", b"/silent ")) as silent:
        assert edge.ask(GET[:-2])[0] == 408
        assert read_answer(silent) == (0, b"")
    assert "a fault" in caplog.text


def test_a_client_that_reads_slowly_is_not_cut_off(edge: Edge) -> None:
    with edge.connect(GET.replace(b"/ ", b"/flood ")) as peer:
        for _ in range(10):
            peer.recv(2**22)
            time.sleep(0.25)
        assert edge.app.running == 1
    edge.wait_idle()


def test_a_client_that_leaves_with_a_request_in_the_queue_ends_the_running_one(edge: Edge) -> None:
    with edge.connect(GET.replace(b"/ ", b"/flood ") + GET) as peer:
        peer.recv(1000)
    edge.wait_idle()


def test_an_answer_that_takes_too_long_is_ended(edge: Edge) -> None:
    status, message = error(edge.ask(GET.replace(b"/ ", b"/silent ")))
    assert (status, "FUSION_REQUEST_TIMEOUT_S" in message) == (504, True)
    edge.wait_idle()


def test_an_answer_that_streams_too_long_is_cut(edge: Edge) -> None:
    with edge.connect(GET.replace(b"/ ", b"/flood ")) as peer, contextlib.suppress(ConnectionError):
        while peer.recv(2**22):
            pass
    edge.wait_idle()


def test_idle_connections_are_closed_for_others(edge: Edge) -> None:
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(edge.connect(b"GET / HTTP/1.1\r\n")) for _ in range(500)]
        assert edge.ask(LAST)[0] == 200
        assert {read_answer(peer) for peer in peers[: 500 - LIMITS.connections]} == {(0, b"")}


def test_whoever_comes_again_when_told_finds_the_connection_open(edge: Edge) -> None:
    with edge.connect(GET) as peer:
        assert peer.recv(2**16)
        time.sleep(RETRY_AFTER_S + 0.5)
        peer.sendall(LAST)
        assert read_answer(peer)[0] == 200


def test_requests_beyond_the_limit_are_told_when_to_retry(edge: Edge) -> None:
    with contextlib.ExitStack() as peers:
        for _ in range(8):
            peers.enter_context(edge.connect(GET.replace(b"/ ", b"/silent ")))
        time.sleep(0.5)
        assert edge.app.running == 6  # three quarters: one client's share
        status, data = edge.ask(LAST)
        assert (status, re.search(rb"retry-after: \d", data) is not None) == (429, True)
        assert edge.ask(LAST.replace(b"/ ", b"/livez ", 1))[0] == 200
    edge.wait_idle()
    assert edge.ask(LAST)[0] == 200


def test_an_answer_that_is_not_read_keeps_its_place_until_it_is_cut(edge: Edge) -> None:
    with contextlib.ExitStack() as peers:
        for _ in range(6):
            peers.enter_context(edge.connect(GET.replace(b"/ ", b"/large ")))
        time.sleep(0.5)
        assert edge.app.running == 0
        assert edge.ask(LAST)[0] == 429
        time.sleep(3 * LIMITS.client_timeout_s)
        assert edge.ask(LAST)[0] == 200


@pytest.mark.parametrize("request_", [LAST, GET])
def test_a_large_answer_is_read_whole_however_slowly(edge: Edge, request_: bytes) -> None:
    size = 0
    with edge.connect(request_.replace(b"/ ", b"/large ", 1)) as peer:
        while size <= len(LARGE) and (part := peer.recv(2**20)):
            size += len(part)
            time.sleep(0.03)  # over a second in all, within the time of an answer
    assert size > len(LARGE)


def test_an_answer_that_has_just_begun_is_not_taken_for_one_that_is_not_read(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MIN_RATE", len(LARGE))

    def read_late(number: int) -> int:
        time.sleep(0.05 * number)
        with edge.connect(LAST.replace(b"/ ", b"/large ", 1)) as peer:
            time.sleep(0.2)  # connections are checked once a second: some of these in this time
            return len(read_answer(peer)[1])

    with ThreadPoolExecutor(24) as pool:
        assert min(pool.map(read_late, range(24))) > len(LARGE)


def test_an_upgrade_is_answered_as_http(edge: Edge) -> None:
    upgrade = (
        b"connection: close, upgrade\r\nupgrade: websocket\r\nsec-websocket-key: x\r\nsec-websocket-version: 13\r\n\r\n"
    )
    assert edge.ask(GET[:-2] + upgrade)[0] == 200


def test_what_is_not_http_is_answered_in_the_shape_of_all_errors(edge: Edge) -> None:
    assert error(edge.ask(b"\x16\x03\x01 hello\r\n\r\n")) == (400, "Invalid HTTP request received.")
