"""How a replica passes requests to its server, and when it gives that up: against real connections."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress

import pytest

from service.fleet.routing import Call, Head, ReplicaLostError
from service.fleet.server import ReplicaServer

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\ncontent-length: 4\r\n\r\nbusy"
CUT = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nfour"
ODD = (
    b"HTTP/1.1 200 OK\r\nX-Fusion-Stack: ab\r\nx-request-id: one\r\nConnection: X-Hop\r\nX-Hop: 1\r\n"
    b"Transfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n\r\n3\r\n\x1f\x8b\x00\r\n2\r\n\x00\xff\r\n0\r\n\r\n"
)


class Asked:
    """What one call to a replica gave, what its server was sent, and how often the replica gave it up."""

    def __init__(self, call: Call, answers: Mapping[str, bytes] | None) -> None:
        self.parts: list[Head | bytes] = []
        self.sent, self.ends, self.lost = b"", 0, False
        asyncio.run(self._run(call, answers))

    async def _run(self, call: Call, answers: Mapping[str, bytes] | None) -> None:
        replica = ReplicaServer({}, self._end, 1)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert answers is not None
            with suppress(asyncio.IncompleteReadError):
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split()[1].decode()
                if path != "/health":
                    self.sent = head + await reader.readexactly(len(call.body))
                writer.write(answers[path])
                await writer.drain()
            writer.close()

        port = int(replica.url.rpartition(":")[2])
        server = None if answers is None else await asyncio.start_server(serve, "127.0.0.1", port)
        try:
            async for part in replica.pass_on(call):
                self.parts.append(part)
        except ReplicaLostError:
            self.lost = True
        finally:
            if server is not None:
                server.close()

    def _end(self) -> None:
        self.ends += 1


def test_bytes_and_headers_pass_as_they_are() -> None:
    headers = [(b"host", b"fusion.example"), (b"content-length", b"3"), (b"connection", b"close")]
    headers += [(b"traceparent", b"00-ab"), (b"authorization", b"Bearer k")]
    asked = Asked(Call("POST", "/v1/a%2Fb?x=1", headers, b"{ }"), {"/v1/a%2Fb?x=1": ODD})
    head, *body = asked.parts
    assert isinstance(head, Head)
    expected = [(b"x-fusion-stack", b"ab"), (b"x-request-id", b"one"), (b"content-encoding", b"gzip")]
    assert head.headers == expected
    assert b"".join(part for part in body if isinstance(part, bytes)) == b"\x1f\x8b\x00\x00\xff"
    first, *lines = asked.sent.split(b"\r\n")
    assert first == b"POST /v1/a%2Fb?x=1 HTTP/1.1"
    assert {line.lower() for line in lines if b":" in line} == {
        *(b"host: fusion.example", b"content-length: 3", b"traceparent: 00-ab", b"authorization: bearer k")
    }
    assert lines[-1] == b"{ }"


@pytest.mark.parametrize(
    ("answers", "status", "lost", "ends"),
    [
        ({"/": OK}, 200, False, 0),
        ({"/": BUSY, "/health": OK}, 503, False, 0),
        ({"/": BUSY, "/health": BUSY}, 503, False, 1),
        ({"/": CUT, "/health": OK}, 200, True, 0),
        ({"/": CUT, "/health": BUSY}, 200, True, 1),
        (None, 0, True, 1),
    ],
    ids=["answers", "is busy", "restarts", "breaks off", "breaks off and restarts", "is gone"],
)
def test_a_server_is_given_up_only_when_it_cannot_answer(
    answers: Mapping[str, bytes] | None, status: int, lost: bool, ends: int
) -> None:
    asked = Asked(Call("GET", "/", [(b"host", b"x")]), answers)
    statuses = [part.status for part in asked.parts if isinstance(part, Head)]
    assert (statuses, asked.lost, asked.ends) == ([status] if status else [], lost, ends)
