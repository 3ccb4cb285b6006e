"""Requests whose stack or build gets no slot of the engine's batch: they end in time, and say when to come again."""

import contextlib
import time
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.types import Message

from service.engine.overflow import raise_ends
from service.engine.slot_waits import PERIOD_S, STOP_REASON, SlotsBusyError, SlotWaits
from service.metered import MAX_HELD, MeteredSend
from service.metrics import Metrics
from tests.conftest import Server

WAIT_S, SLACK_S = 3, 10.0
"""The small server's FUSION_WAIT_TIMEOUT_S, and how much later than that is in time on a busy machine."""
BUILDS = [f"svd({i / 10}*task + 0.5*safety, rank=8)" for i in (3, 5, 7)]
START: Message = {"type": "http.response.start", "status": 200, "headers": []}


def request(id_: str, adapter: int | None, tokens: int = 0) -> Any:
    lora = None if adapter is None else SimpleNamespace(lora_int_id=adapter)
    return SimpleNamespace(request_id=id_, lora_request=lora, num_output_tokens=tokens)


def test_who_waits_for_a_slot_for_too_long_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    waits, running = SlotWaits(3), [request("a", 1), request("b", 2), request("base", None)]
    waiting = [request("same", 1), request("other", 3), request("more", None), request("begun", 4, tokens=1)]
    assert waits.find_late(running, waiting, 2) == []
    clock[0] += 3 + PERIOD_S
    assert waits.find_late(running, [*waiting, request("new", 5)], 3) == []  # there is a slot
    clock[0] += PERIOD_S / 2
    assert waits.find_late(running, waiting, 2) == []  # not yet looked at again
    clock[0] += PERIOD_S
    assert {*waits.find_late(running, [*waiting, request("new", 5)], 2)} == {"other", "begun"}
    clock[0] += 3 + PERIOD_S
    assert waits.find_late(running, [request("new", 5)], 2) == ["new"]
    clock[0] += 3 + PERIOD_S
    assert waits.find_late(running, waiting, 2) == []  # its time begins anew


class Sent(list[Message]):
    """What a client gets."""

    async def __call__(self, message: Message) -> None:
        self.append(message)


def make_metered(sent: Sent, series: CollectorRegistry | None = None) -> MeteredSend:
    metered = MeteredSend(sent, Metrics(series or CollectorRegistry()), SimpleNamespace(profiles={}))  # type: ignore[arg-type]  # its profiles only
    metered.may_wait, metered.headers = True, [(b"x-fusion-mode", b"built")]
    return metered


@pytest.mark.anyio
async def test_a_stream_that_got_no_slot_is_a_503_and_not_an_event() -> None:
    metered = make_metered(sent := Sent(), series := CollectorRegistry())
    await metered(dict(START))
    assert sent == []
    metered.refuse(str(SlotsBusyError()))
    metered.refuse(str(SlotsBusyError()))  # of another of its generations
    assert series.get_sample_value("fusion_refusals_total", {"reason": "engine"}) == 1
    for text in (b"data: {}\n\n", b""):
        await metered({"type": "http.response.body", "body": text, "more_body": bool(text)})
    head, body = sent
    assert (head["status"], dict(head["headers"])[b"retry-after"]) == (503, b"5")
    assert b"FUSION_MAX_LORAS" in body["body"]


@pytest.mark.anyio
async def test_an_answer_begins_with_its_first_token_and_is_whole() -> None:
    metered = make_metered(sent := Sent())
    await metered(dict(START))
    metered.begin_answer()
    texts = [b"one", b"two", b""]
    for text in texts:
        await metered({"type": "http.response.body", "body": text, "more_body": bool(text)})
    metered.refuse("too late")  # of another of its generations
    assert [message.get("body") for message in sent] == [None, *texts]
    assert dict(sent[0]["headers"]) == {b"x-fusion-mode": b"built"}


@pytest.mark.anyio
async def test_messages_that_wait_for_a_token_have_a_bound() -> None:
    metered = make_metered(sent := Sent())
    await metered(dict(START))
    for _ in range(MAX_HELD):
        await metered({"type": "http.response.body", "body": b"event", "more_body": True})
    assert len(sent) == MAX_HELD + 1


@pytest.mark.anyio
async def test_an_end_for_want_of_a_slot_is_retryable() -> None:
    async def answer() -> AsyncGenerator[Any, None]:
        yield SimpleNamespace(outputs=[SimpleNamespace(stop_reason=STOP_REASON)])

    with pytest.raises(SlotsBusyError) as caught:
        await anext(raise_ends(answer, {STOP_REASON: SlotsBusyError})())
    assert caught.value.status_code == 503


@contextlib.contextmanager
def occupy(server: Server, model: str) -> Iterator[None]:
    """An answer that goes on for minutes."""
    body = {"model": model, "prompt": "Hello", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        next(lines)
        yield
        next(lines)  # a generator that nobody holds would have closed the connection


ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "Hello", "max_tokens": 2}),
    ("/v1/completions", {"prompt": "Hello", "max_tokens": 2, "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "stream": True}),
    ("/v1/responses", {"input": "x", "max_output_tokens": 16, "stream": True}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "stream": True}),
]


def test_a_request_that_gets_no_slot_in_time_is_told_when_to_retry(small_server: Server) -> None:
    for build in BUILDS:  # made and loaded, so that only slots are short
        answer = httpx.post(f"{small_server.url}/v1/completions", json={"model": build, **ASKED[0][1]}, timeout=60)
        assert answer.status_code == 200, answer.text
    with occupy(small_server, BUILDS[0]), occupy(small_server, BUILDS[1]):
        for path, body in ASKED:
            start = time.monotonic()
            answer = httpx.post(f"{small_server.url}{path}", json={"model": BUILDS[2], **body}, timeout=60)
            assert time.monotonic() - start < WAIT_S + SLACK_S
            assert (answer.status_code, "retry-after" in answer.headers) == (503, True), answer.text
            assert "FUSION_MAX_LORAS" in answer.json()["error"]["message"]
        for model in (BUILDS[0], "smollm2-135m-instruct"):  # whoever has a slot, or needs none
            answer = httpx.post(f"{small_server.url}/v1/completions", json={"model": model, **ASKED[0][1]}, timeout=60)
            assert answer.status_code == 200
    answer = httpx.post(f"{small_server.url}/v1/completions", json={"model": BUILDS[2], **ASKED[1][1]}, timeout=60)
    assert answer.status_code == 200
    assert "[DONE]" in answer.text
