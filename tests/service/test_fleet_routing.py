"""Which stack a request is routed by, and what becomes of it when its replica is lost: without Ray or a server."""

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from service.errors import ApiError
from service.fleet import routing
from service.fleet.routing import Call, Head, ReplicaLostError, Stacks, answer, error_event
from service.fleet.server import drop_hop_headers, hold_folder

KEY, OTHER = "ab" * 32, "cd" * 32
JSON = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]
Part = Head | bytes | Exception


def post(model: object = "p", path: str = "/v1/completions", **more: object) -> Call:
    return Call("POST", path, [(b"authorization", b"Bearer k"), *JSON], json.dumps({"model": model, **more}).encode())


class Fleet:
    """Answers in turn what it was given; a question for a model's stack with `KEY`."""

    def __init__(self, *answers: list[Part], stack: Callable[[], Awaitable[list[Part]]] | None = None) -> None:
        self.answers, self.stack = list(answers), stack
        self.calls: list[tuple[Call, str]] = []
        self.closed = 0

    async def send(self, call: Call, key: str) -> AsyncGenerator[Head | bytes, None]:
        self.calls.append((call, key))
        if call.path.startswith("/v1/models/"):
            card = json.dumps({"fusion": {"stack": KEY}}).encode()
            parts: list[Part] = [Head(200, JSON), card] if self.stack is None else await self.stack()
        else:
            parts = self.answers.pop(0)
        try:
            for part in parts:
                if isinstance(part, Exception):
                    raise part
                yield part
        finally:
            self.closed += 1

    def ask(self, call: Call, stacks: Stacks | None = None) -> tuple[Head, bytes]:
        async def run() -> tuple[Head, bytes]:
            head, body = await answer(call, self.send, stacks or Stacks(self.send))
            return head, b"".join([part async for part in body])

        return asyncio.run(run())


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "PAUSES_S", (0.0,) * 3)
    monkeypatch.setattr(routing, "LOOKUP_S", 0.2)


def whole(*more: tuple[bytes, bytes]) -> list[Part]:
    return [Head(200, [*JSON, *more]), b"whole"]


def test_a_stack_is_asked_for_once_with_the_client_s_key() -> None:
    fleet = Fleet(whole(), whole())
    stacks = Stacks(fleet.send)
    for _ in range(2):
        assert fleet.ask(post("0.5*a + 0.5*b/c"), stacks)[1] == b"whole"
    (question, to), (_, first), (_, second) = fleet.calls
    assert (question.method, question.target, to) == ("GET", "/v1/models/0.5%2Aa%20%2B%200.5%2Ab%2Fc", "")
    assert question.headers == [(b"authorization", b"Bearer k")]
    assert first == second == KEY


def test_an_answer_s_stack_is_the_next_one_s() -> None:
    """A profile that was switched is routed by its new stack from the first answer on."""
    fleet = Fleet(whole((b"x-fusion-stack", OTHER.encode())), whole())
    stacks = Stacks(fleet.send)
    for _ in range(2):
        fleet.ask(post(), stacks)
    assert [key for _, key in fleet.calls] == ["", KEY, OTHER]


@pytest.mark.parametrize(
    ("call", "model"),
    [
        (post("base", fusion="0.5*a"), "0.5*a"),
        (post("base", fusion={"b": 1, "a": 2}), '{"a": 2, "b": 1}'),
        (post("base", fusion=""), "base"),
        (post(3), "3"),
        (Call("POST", "/v1/completions", [], b'{"model": '), ""),
        (Call("POST", "/v1/completions", [], b'["model"]'), ""),
        (Call("POST", "/v1/adapters", [], b'\xff"'), ""),
        (Call("GET", "/v1/models", []), ""),
    ],
)
def test_what_a_body_names(call: Call, model: str) -> None:
    assert call.find_model() == model


async def never() -> list[Part]:
    await asyncio.sleep(60)
    return []


async def unknown() -> list[Part]:
    return [Head(404, JSON), b"{}"]


async def lost() -> list[Part]:
    return [ReplicaLostError()]


async def garbled() -> list[Part]:
    return [Head(200, JSON), b"<html>"]


@pytest.mark.parametrize("stack", [never, unknown, lost, garbled])
def test_without_a_stack_any_replica_answers(stack: Callable[[], Awaitable[list[Part]]]) -> None:
    fleet = Fleet(whole(), stack=stack)
    assert fleet.ask(post())[1] == b"whole"
    assert fleet.calls[-1][1] == ""


def test_few_stacks_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "MAX_STACKS", 2)
    fleet = Fleet(*[whole() for _ in range(5)])
    stacks = Stacks(fleet.send)
    for model in ("a", "b", "a", "c", "a"):
        fleet.ask(post(model), stacks)
    assert sum(call.path.startswith("/v1/models/") for call, _ in fleet.calls) == 3  # a stays, as used last


@pytest.mark.parametrize(
    "begun",
    [[], [Head(200, JSON)], [Head(200, JSON), b"ha"], [Head(200, EVENTS)]],
    ids=["nothing", "head", "part of a whole answer", "head of a stream"],
)
def test_a_lost_request_is_answered_by_another_replica(begun: list[Part]) -> None:
    fleet = Fleet([*begun, ReplicaLostError()], whole())
    assert fleet.ask(post())[1] == b"whole"
    assert fleet.closed == 3  # the question, too


def test_a_stream_that_had_begun_ends_with_an_error() -> None:
    fleet = Fleet([Head(200, EVENTS), b"data: 1\n\n", b"data: 2\n\n", ReplicaLostError()])
    _, body = fleet.ask(post())
    assert body == b"data: 1\n\ndata: 2\n\n" + error_event("/v1/completions")
    assert len(fleet.calls) == 2


def test_large_answers_are_passed_on_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not repeated then: the connection is cut, so that the client sees bytes missing."""
    monkeypatch.setattr(routing, "HELD_BYTES", 3)
    fleet = Fleet([Head(200, JSON), b"four", ReplicaLostError()])
    with pytest.raises(ReplicaLostError):
        fleet.ask(post())


def test_tries_have_an_end() -> None:
    lost: list[Part] = [ReplicaLostError()]
    fleet = Fleet(lost, lost, lost)
    with pytest.raises(ApiError, match="No replica could answer") as caught:
        fleet.ask(post())
    assert (caught.value.status, len(fleet.calls)) == (503, 4)


@pytest.mark.parametrize(
    ("method", "path", "repeats"),
    [
        ("PUT", "/v1/fusions/p", False),
        ("POST", "/v1/adapters", False),
        ("POST", "/v1/load_lora_adapter", False),
        ("GET", "/v1/fusions/p/export?x=1", True),
        ("POST", "/v1/fusions/plan", True),
        ("POST", "/v1/messages", True),
    ],
)
def test_changes_are_made_once(method: str, path: str, repeats: bool) -> None:
    fleet = Fleet([ReplicaLostError()], whole())
    call = Call(method, path, JSON)
    if repeats:
        assert fleet.ask(call)[1] == b"whole"
    else:
        with pytest.raises(ApiError, match="look whether it was made"):
            fleet.ask(call)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_an_error_event_is_what_the_route_s_clients_read(path: str) -> None:
    event: Any = error_event(path).decode()
    lines = dict(line.split(": ", 1) for line in event.strip().split("\n\n")[0].splitlines())
    data = json.loads(lines["data"])
    assert event.startswith("\n\n")  # ends an event that was cut
    if path == "/v1/chat/completions":
        assert data["error"]["code"] == 502
        assert event.endswith("data: [DONE]\n\n")
    else:
        assert lines["event"] == data["type"] == "error"


def test_a_client_that_goes_ends_its_request() -> None:
    fleet = Fleet([Head(200, EVENTS), b"1", b"2"])

    async def run() -> None:
        _, body = await answer(post(), fleet.send, Stacks(fleet.send))
        await anext(body)
        await body.aclose()  # type: ignore[attr-defined]  # a generator, which the type does not say

    asyncio.run(run())
    assert fleet.closed == 2


def test_headers_of_one_connection_stay_there() -> None:
    headers = [(b"connection", b"keep-alive, X-Own"), (b"x-own", b"1"), (b"te", b"trailers"), (b"traceparent", b"00")]
    assert drop_hop_headers(headers) == [(b"traceparent", b"00")]


def test_replicas_of_a_machine_have_folders_of_their_own(tmp_path: Path) -> None:
    (one, first), (two, second) = hold_folder(tmp_path), hold_folder(tmp_path)
    assert [one.name, two.name] == ["replica-0", "replica-1"]
    os.close(first)
    again, third = hold_folder(tmp_path)
    assert again == one
    os.close(second)
    os.close(third)
