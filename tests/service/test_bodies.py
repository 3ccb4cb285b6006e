"""Bodies and requests in progress at the edge, as direct ASGI calls."""

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from service.callers import CALLER, Caller
from service.edge.bodies import LARGEST_BODIES, TRANSFERS, UPLOAD_OVERHEAD, LimitBodies
from service.edge.clients import LimitRequests, Shares, client_network
from service.settings import Settings

LIMIT = 1000
SETTINGS = Settings(max_body_bytes=LIMIT, max_upload_bytes=LIMIT)
MULTIPART = {"content-type": "Multipart/Form-Data; boundary=x"}

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


class Request:
    """One request: its parts are received as they are fed, what is sent is kept."""

    def __init__(self, path: str = "/", client: str = "192.0.2.1", **headers: str) -> None:
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self.scope: Scope = {"type": "http", "method": "POST", "path": path, "headers": raw, "client": (client, 1)}
        self.parts: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        self.task: asyncio.Task[None] | None = None

    def start(self, app: Any) -> "Request":
        self.task = asyncio.create_task(app(self.scope, self.parts.get, self.send))
        return self

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def feed(self, part: bytes, *, more: bool = True) -> None:
        self.parts.put_nowait({"type": "http.request", "body": part, "more_body": more})
        await settle()

    async def end(self) -> int:
        assert self.task is not None
        await self.task
        return self.status

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"]) if self.sent else 0

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class App:
    """Reads the whole body, waits for `gate`, answers 200."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        self.bodies.append(body)
        await self.gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def edge(app: App) -> LimitBodies:
    return LimitBodies(app, SETTINGS)


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {"content-length": str(LIMIT + 1)}, 413),
        ("/v1/adapters", {"content-length": str(LIMIT + 1)}, 413),
        ("/v1/adapters", {**MULTIPART, "content-length": str(LIMIT + UPLOAD_OVERHEAD + 1)}, 413),
        ("/v1/completions", {**MULTIPART, "content-length": str(LIMIT + 1)}, 413),
        ("/", {"content-encoding": "gzip"}, 415),
        ("/", {"content-encoding": "identity, br"}, 415),
    ],
)
async def test_what_the_head_says_is_refused_unread(
    app: App, edge: LimitBodies, path: str, headers: dict[str, str], status: int
) -> None:
    request = Request(path, **headers).start(edge)
    assert await request.end() == status
    assert (request.headers[b"connection"], app.bodies) == (b"close", [])
    assert json.loads(request.sent[1]["body"])["error"]["code"] == status


async def test_the_app_sees_a_body_only_when_it_is_whole(app: App, edge: LimitBodies) -> None:
    app.gate.set()
    request = Request().start(edge)
    await request.feed(b"a" * 600)
    assert app.bodies == []
    await request.feed(b"b" * 400, more=False)
    assert (await request.end(), app.bodies) == (200, [b"a" * 600 + b"b" * 400])


async def test_a_body_that_grows_too_large_is_refused(app: App, edge: LimitBodies) -> None:
    request = Request().start(edge)
    await request.feed(bytes(LIMIT))
    await request.feed(b"x")
    assert (await request.end(), app.bodies) == (413, [])


async def test_a_client_that_leaves_is_not_answered(app: App, edge: LimitBodies) -> None:
    request = Request().start(edge)
    await request.feed(b"x")
    request.parts.put_nowait({"type": "http.disconnect"})
    assert (await request.end(), app.bodies) == (0, [])


async def fill(edge: LimitBodies, clients: Iterable[int], *, more: bool) -> list[Request]:
    requests = [Request(client=f"192.0.2.{client}").start(edge) for client in clients]
    for request in requests:
        await request.feed(bytes(LIMIT), more=more)
    return requests


async def test_memory_full_of_incomplete_bodies_is_taken_from_the_oldest(app: App, edge: LimitBodies) -> None:
    app.gate.set()
    slow = await fill(edge, range(LARGEST_BODIES), more=True)
    honest = Request().start(edge)
    await honest.feed(b"honest", more=False)
    assert (await honest.end(), app.bodies) == (200, [b"honest"])
    for request in slow:
        await request.feed(b"", more=False)
    assert [await request.end() for request in slow] == [429, *[200] * (LARGEST_BODIES - 1)]
    assert slow[0].headers[b"retry-after"].isdigit()


async def test_memory_full_of_requests_in_progress_refuses_more(app: App, edge: LimitBodies) -> None:
    running = await fill(edge, range(LARGEST_BODIES), more=False)
    late = Request().start(edge)
    await late.feed(b"x", more=False)
    assert (await late.end(), late.headers[b"connection"]) == (429, b"close")
    app.gate.set()
    assert {await request.end() for request in running} == {200}
    after = Request().start(edge)
    await after.feed(bytes(LIMIT), more=False)
    assert await after.end() == 200


@pytest.mark.parametrize("more", [False, True])
async def test_the_bodies_of_one_client_leave_memory_for_others(app: App, edge: LimitBodies, more: bool) -> None:
    share = 3 * LARGEST_BODIES // 4
    slow = await fill(edge, [9], more=True)
    held = await fill(edge, [1] * share, more=more)
    late = Request().start(edge)
    await late.feed(b"x", more=False)
    assert (await late.end(), late.headers[b"retry-after"].isdigit()) == (429, True)
    other = Request(client="192.0.2.2").start(edge)
    await other.feed(bytes(LIMIT), more=False)
    app.gate.set()
    for request in (*slow, *(held if more else [])):
        await request.feed(b"", more=False)
    assert {await request.end() for request in (*slow, *held, other)} == {200}
    again = await fill(edge, [1] * share, more=False)
    assert {await request.end() for request in again} == {200}


async def test_uploads_come_in_pieces_and_are_cut_at_their_limit(app: App, edge: LimitBodies) -> None:
    app.gate.set()
    upload = Request("/v1/adapters", **MULTIPART).start(edge)
    await upload.feed(bytes(LIMIT + UPLOAD_OVERHEAD), more=False)
    assert (await upload.end(), len(app.bodies[0])) == (200, LIMIT + UPLOAD_OVERHEAD)
    large = Request("/v1/adapters", **MULTIPART).start(edge)
    await large.feed(bytes(LIMIT + UPLOAD_OVERHEAD))
    await large.feed(b"x")
    with pytest.raises(Exception, match="larger than"):  # for the route to answer
        await large.end()


async def test_uploads_in_progress_are_bounded(app: App, edge: LimitBodies) -> None:
    clients = [f"192.0.2.{number // 2}" for number in range(TRANSFERS)]
    running = [Request("/v1/adapters", client, **MULTIPART).start(edge) for client in clients]
    await settle()
    late = Request("/v1/adapters", "192.0.2.99", **MULTIPART).start(edge)
    assert (await late.end(), late.headers[b"retry-after"].isdigit()) == (429, True)
    app.gate.set()
    for request in running:
        await request.feed(b"", more=False)
        assert await request.end() == 200
    again = Request("/v1/adapters", **MULTIPART).start(edge)
    await again.feed(b"", more=False)
    assert await again.end() == 200


async def test_exports_in_progress_are_bounded(app: App, edge: LimitBodies) -> None:
    running = [Request("/v1/fusions/x/export", f"192.0.2.{number}").start(edge) for number in range(TRANSFERS)]
    for request in running:
        await request.feed(b"", more=False)
    assert await Request("/v1/fusions/y/export", "192.0.2.99").start(edge).end() == 429
    app.gate.set()
    assert {await request.end() for request in running} == {200}


async def test_an_error_inside_frees_the_place_and_the_memory() -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("inside")

    edge = LimitBodies(LimitRequests(fail, exempt=(), max_requests=1), SETTINGS)
    for path, headers in (("/", {}), ("/v1/adapters", MULTIPART)):
        for _ in range(2 * LARGEST_BODIES):
            request = Request(path, **headers).start(edge)
            await request.feed(bytes(LIMIT), more=False)
            with pytest.raises(RuntimeError, match="inside"):
                await request.end()


async def test_one_client_leaves_places_for_others(app: App) -> None:
    edge = LimitRequests(app, exempt=("/livez",), max_requests=4)
    running = [Request().start(edge) for _ in range(4)]
    await settle()
    assert [request.status for request in running] == [0, 0, 0, 429]
    other = Request(client="192.0.2.2").start(edge)
    await settle()
    assert other.status == 0
    assert await Request(client="192.0.2.3").start(edge).end() == 429
    livez = Request("/livez", client="192.0.2.3")
    assert await livez.start(edge).end() == 429  # a POST is no health check
    livez = Request("/livez", client="192.0.2.3")
    livez.scope["method"] = "GET"
    livez.start(edge)
    app.gate.set()
    for request in (*running[:3], other, livez):
        await request.feed(b"", more=False)
        assert await request.end() == 200


async def test_one_tenant_behind_a_gateway_leaves_places_for_others(app: App) -> None:
    edge = LimitRequests(app, exempt=(), max_requests=4)
    requests = [Request() for _ in range(5)]
    for number, request in enumerate(requests):  # all have the gateway's address
        request.scope[CALLER] = Caller(f"k{number}", "user", "noisy" if number < 4 else "quiet")
        request.start(edge)
    await settle()
    assert [request.status for request in requests] == [0, 0, 0, 429, 0]
    app.gate.set()
    for request in (*requests[:3], requests[4]):
        await request.feed(b"", more=False)
        assert await request.end() == 200


async def test_a_place_can_be_taken_by_a_lone_client() -> None:
    places = Shares(1)
    assert (places.take("a"), places.take("a"), places.take("b")) == (True, False, False)
    places.free("a")
    assert places.take("b")


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("tenant acme", "name tenant acme"),
        ("x" * 60_000, "name " + "x" * 59),
    ],
)
async def test_an_ipv6_network_is_one_client(address: str, network: str) -> None:
    assert client_network(address) == network
