"""A gate that fails: the recipe's own weights are used, and the reason is said."""

import asyncio
import math
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from vllm.exceptions import VLLMValidationError

from service.engine.gate_passes import MAX_READINGS, GateReader, ask_gates
from service.engine.models import GatePass, LoRARequest, ServedModel, meter, served_model
from service.metered import MeteredSend
from service.metrics import Metrics

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]
GATE_LORA, CHOSEN, DEFAULT = (LoRARequest(name, 7, "/x") for name in ("gate", "chosen", "default"))
PROMPT = {"type": "token", "prompt_token_ids": [1, 2, 3]}


class Engine:
    """Answers the gate's pass with `value`, or as `fault` says."""

    def __init__(self, value: float = 1.0, fault: str = "") -> None:
        self.value, self.fault = value, fault
        self.asked: list[str] = []
        self.open = 0
        self.seen: list[tuple[float | None, str]] = []

    async def generate(
        self, prompt: Any, params: Any, request_id: str, *, lora_request: Any = None, **_: Any
    ) -> AsyncGenerator[Any, None]:
        self.asked.append(lora_request.lora_name)
        self.open += 1
        try:
            if lora_request is GATE_LORA:
                assert (params.max_tokens, params.logprob_token_ids) == (1, [5, 6])
                prompt.clear()  # as vLLM may
                if self.fault == "raise":
                    raise RuntimeError("out of order")
                if self.fault == "prompt":
                    raise VLLMValidationError("Token id 9 is out of vocabulary")
                if self.fault == "hang":
                    await asyncio.sleep(3600)
            step = {5: SimpleNamespace(logprob=self.value), 6: SimpleNamespace(logprob=0.0)}
            yield SimpleNamespace(outputs=[SimpleNamespace(logprobs=[] if self.fault == "empty" else [step])])
        finally:
            self.open -= 1

    async def choose(self, value: float | None, reason: str) -> LoRARequest:
        self.seen.append((value, reason))
        return DEFAULT if value is None else CHOSEN

    def gate(self, digest: str = "g") -> GatePass:
        return GatePass(digest, 5, 6, lambda: self.choose)

    async def answer(self, reader: GateReader, prompt: Any = PROMPT, digest: str = "g") -> None:
        token = served_model.set(ServedModel("m", GATE_LORA, None, self.gate(digest)))
        try:
            outputs = ask_gates(self.generate, reader)(prompt, SimpleNamespace(n=1), "r", lora_request=GATE_LORA)
            assert len([output async for output in outputs]) == 1
        finally:
            served_model.reset(token)


async def test_a_prompt_is_read_once() -> None:
    engine = Engine(0.5)
    reader = GateReader(engine.generate, 5)
    for _ in range(3):
        await engine.answer(reader)
    assert engine.asked == ["gate", "chosen", "chosen", "chosen"]
    assert engine.seen == [(0.5, "")] * 3
    await engine.answer(reader, digest="other")
    await engine.answer(reader, {**PROMPT, "cache_salt": "mine"})
    await engine.answer(reader, {**PROMPT, "type": "multimodal"})
    assert engine.asked.count("gate") == 4


@pytest.mark.parametrize(
    ("fault", "value", "reason"),
    [
        ("raise", 1.0, "it failed with RuntimeError"),
        ("prompt", 1.0, "it failed with VLLMValidationError"),
        ("hang", 1.0, "it took more than 0.05 s"),
        ("empty", 1.0, "it failed with IndexError"),
        ("", math.nan, "its value is not a finite number"),
        ("", math.inf, "its value is not a finite number"),
    ],
)
async def test_a_gate_that_fails_leaves_the_default(
    fault: str, value: float, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(value, fault)
    reader = GateReader(engine.generate, 0.05)
    for _ in range(2):  # a failure is not remembered
        await engine.answer(reader)
    assert engine.seen == [(None, reason)] * 2
    assert bool(caplog.records) == (fault in ("raise", "empty")), "what is the client's fault is no error of the server"
    assert engine.asked == ["gate", "default"] * 2
    assert engine.open == 0


async def test_the_readings_that_are_kept_are_bounded() -> None:
    engine = Engine()
    reader = GateReader(engine.generate, 5)
    for i in range(MAX_READINGS + 10):
        await reader.choose(engine.gate(), GATE_LORA, {**PROMPT, "prompt_token_ids": [i + 1]}, "r")
    engine.asked.clear()
    for number in (1, MAX_READINGS + 10):  # the oldest is forgotten, the newest is not
        await reader.choose(engine.gate(), GATE_LORA, {**PROMPT, "prompt_token_ids": [number]}, "r")
    assert engine.asked == ["gate"]


async def test_a_client_that_leaves_ends_the_gate_s_pass() -> None:
    engine = Engine(fault="hang")
    task = asyncio.create_task(engine.answer(GateReader(engine.generate, 60)))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert engine.open == 0
    assert engine.seen == []


class Sink:
    """What a request has running in the engine."""

    running = 0

    def begin_usage(self) -> None:
        self.running += 1

    def record_usage(self, *_: object) -> None:
        self.running -= 1

    def record_gap(self, *_: object) -> None:
        pass

    def begin_answer(self) -> None:
        pass

    def refuse(self, message: str) -> None:
        pass


async def test_a_pass_is_counted_as_running_and_has_its_answer_s_priority() -> None:
    sink, seen = Sink(), list[tuple[str, int, int]]()
    engine = Engine()
    stock = engine.generate

    def generate(
        prompt: Any, params: Any, id_: str, *, lora_request: Any, priority: int = 0
    ) -> AsyncGenerator[Any, None]:
        seen.append((lora_request.lora_name, priority, sink.running))
        return stock(prompt, params, id_, lora_request=lora_request)

    gate = engine.gate()
    tokens = served_model.set(ServedModel("m", GATE_LORA, None, gate)), meter.set(sink)
    try:
        asked = ask_gates(generate, GateReader(generate, 5))
        async for _ in asked(PROMPT, SimpleNamespace(n=1), "r", lora_request=GATE_LORA, priority=3):
            assert sink.running == 1
    finally:
        served_model.reset(tokens[0])
        meter.reset(tokens[1])
    assert seen == [("gate", 3, 1), ("chosen", 3, 1)]
    assert sink.running == 0


async def test_a_lease_ends_only_when_the_pass_of_a_client_that_left_has_ended() -> None:
    async def send(_: object) -> None:
        raise AssertionError

    engine, released = Engine(fault="hang"), list[int]()
    metered = MeteredSend(send, Metrics(CollectorRegistry()), SimpleNamespace(profiles={}))  # type: ignore[arg-type]  # its profiles only
    token = meter.set(metered)
    task = asyncio.create_task(engine.answer(GateReader(engine.generate, 60)))
    meter.reset(token)
    await asyncio.sleep(0.01)
    task.cancel()
    metered.call_at_end(lambda: released.append(engine.open))  # as the intake does when vLLM's app has returned
    assert released == []
    await asyncio.gather(task, return_exceptions=True)
    assert released == [0]
