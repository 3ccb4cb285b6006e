"""Requests that ask for another protocol, as Java's client and curl do, are answered as if they had not asked."""

import time
from collections.abc import Iterator

import pytest

from tests.service.edges import Edge, post, read_answer, run_edge

H2C = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQCAAAAAAIAAAAA")


@pytest.fixture(scope="module")
def edge() -> Iterator[Edge]:
    with run_edge() as running:
        yield running


WISHES = [  # C3
    H2C,
    ("upgrade: h2c", "connection: upgrade"),
    ("Connection: keep-alive", "Connection: Upgrade,HTTP2-Settings", "Upgrade: h2c, other/2", "HTTP2-Settings: AA"),
    ("connection: upgrade", "upgrade: websocket", "sec-websocket-version: 13", "sec-websocket-key: AAAA"),
    ("connection: upgrade", "upgrade: TLS/1.2"),
    ("upgrade: h2c",),
    ("connection: HTTP2-Settings", "http2-settings: AA"),
]


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("step", [10_000, 7, 1])
def test_the_body_of_a_request_that_asks_to_upgrade_is_read(
    edge: Edge, wish: tuple[str, ...], is_chunked: bool, step: int
) -> None:
    head = post(None if is_chunked else 11, "/echo", *wish)
    body = b"4\r\nbody\r\n7\r\n of it.\r\n0\r\n\r\n" if is_chunked else b"body of it."
    whole = head + body + post(3, "/echo", "connection: close") + b"end"
    with edge.connect() as peer:
        for start in range(0, len(whole), step):
            peer.sendall(whole[start : start + step])
            if step == 1:
                time.sleep(0)  # mostly a packet for each byte
        _, answers = read_answer(peer)
    assert answers.count(b"HTTP/1.1 200 OK") == 2
    first, second = answers.split(b"HTTP/1.1 200 OK")[1:]
    assert b"\r\n\r\n2\r\n11\r\n0\r\n" in first
    assert b"\r\n\r\n1\r\n3\r\n0\r\n" in second


def test_what_is_passed_on_says_nothing_of_the_other_protocol(edge: Edge) -> None:
    status, _ = edge.ask(post(2, "/echo", *H2C, "connection: Close, Upgrade", "x-kept: yes: 1") + b"ab")
    headers = dict(edge.app.headers)
    assert (status, headers[b"x-kept"], headers[b"connection"]) == (200, b"yes: 1", b"Close")
    assert not {b"upgrade", b"http2-settings"} & headers.keys()


def test_requests_with_a_wish_may_follow_each_other(edge: Edge) -> None:
    one, last = post(2, "/echo", *H2C) + b"ab", post(5, "/echo", "connection: close", *H2C) + b"abcde"
    status, answers = edge.ask(one * 8 + last)
    assert (status, answers.count(b"HTTP/1.1 200 OK")) == (200, 9)


def test_a_wish_adds_no_room_to_the_limits(edge: Edge) -> None:
    many = [f"x-{i}: y" for i in range(300)]
    assert edge.ask(post(2, "/echo", *H2C, *many) + b"ab")[0] == 431
    assert edge.ask(post(200_000, "/echo", *H2C))[0] == 413
    slow = post(2, "/echo", *H2C) + b"a"
    assert edge.ask(slow)[0] == 408


def test_connect_has_no_route(edge: Edge) -> None:
    assert edge.ask(b"CONNECT example.org:80 HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 400
