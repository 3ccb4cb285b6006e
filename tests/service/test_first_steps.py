"""Whoever begins beside a crowd does so in a step without it; those left out go on in the next one."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from vllm.v1.core.sched.request_queue import PriorityRequestQueue

from service.engine.first_steps import FirstSteps, mark
from tests.conftest import BASE_NAME, Server


class Steps:
    """vLLM's scheduler, as far as `FirstSteps` changes it: who is in the next step."""

    def __init__(self, *, asynchronous: bool) -> None:
        self.scheduler_config = SimpleNamespace(async_scheduling=asynchronous)
        self.lora_config = SimpleNamespace(max_loras=2)
        self.current_step, self.max_num_active_reqs = 0, 8
        self.running: list[Any] = []
        self.waiting: Any = PriorityRequestQueue()

    def schedule(self) -> list[Any]:
        self.current_step += 1
        step = [request for request in self.running if self.current_step >= request.next_decode_eligible_step]
        while self.waiting and len(self.running) < self.max_num_active_reqs:
            self.running.append(self.waiting.pop_request())
            step.append(self.running[-1])
        return step


class Planned(SimpleNamespace):
    """A request of vLLM's scheduler."""

    def __init__(self, start: int, lora: int, *, alone: bool = False, tokens: int = 0) -> None:
        lora_request = SimpleNamespace(lora_int_id=lora) if lora else None
        super().__init__(priority=mark(start, alone=alone), lora_request=lora_request, num_output_tokens=tokens)
        self.next_decode_eligible_step = 0

    def __lt__(self, other: "Planned") -> bool:
        return bool(self.priority < other.priority)


def plan(*, asynchronous: bool = False) -> Any:
    steps: Any = type("Scheduler", (FirstSteps, Steps), {})(asynchronous=asynchronous)
    steps.running = [Planned(start, 1, tokens=3) for start in (5, 0, 10)]
    return steps


def test_a_step_without_the_crowd_has_those_alone_that_begin_so() -> None:
    steps = plan()
    first, second, later = Planned(0, 2, alone=True), Planned(3, 0, alone=True), Planned(4, 1)
    for request in (later, second, first):
        steps.waiting.add_request(request)
    assert steps.schedule() == [first, second], "the others are left out, those that wait for later steps, too"
    assert len(steps.running) == 5
    assert steps.max_num_active_reqs == 8
    third = Planned(0, 0, alone=True)
    steps.waiting.add_request(third)
    assert len(steps.schedule()) == 7, "never twice in a row"
    steps.waiting.add_request(Planned(7, 0, alone=True))
    assert {request.priority // 2 for request in steps.schedule()} == {0, 3, 4, 5, 7}, "all but the one after it"


@pytest.mark.parametrize("case", ["asynchronous", "no slot", "no place", "nobody after it", "begun", "not marked"])
def test_nobody_is_left_out(case: str) -> None:
    steps = plan(asynchronous=case == "asynchronous")
    steps.waiting.add_request(
        Planned(
            99 if case == "nobody after it" else 0,
            3 if case == "no slot" else 2,
            alone=case != "not marked",
            tokens=case == "begun",
        )
    )
    if case == "no slot":
        steps.running[0].lora_request.lora_int_id = 2
    if case == "no place":
        steps.max_num_active_reqs = 3
    assert {*map(id, steps.running)} <= {*map(id, steps.schedule())}


@pytest.mark.anyio
async def test_who_is_left_out_and_who_begins_alone_answer_as_when_nobody_else_asks(server: Server) -> None:
    """On the real engine, mixes of two stacks and the base."""
    crowd = [
        {"model": f"{weight / 10}*wide + 0.4*narrow", "prompt": "The oak stool", "max_tokens": 40}
        for weight in range(1, 13)
    ]
    few = [
        {"model": model, "prompt": f"The oak stool {number}", "max_tokens": 3}
        for number, model in enumerate(["0.7*stable", "0.2*wide + 0.4*narrow", BASE_NAME] * 3)
    ]
    fixed = {"temperature": 0, "ignore_eos": True, "logprobs": 1}

    async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> list[float]:
        answer = await http.post("/v1/completions", json=body | fixed)
        return list(answer.json()["choices"][0]["logprobs"]["token_logprobs"])

    transport = httpx.AsyncHTTPTransport(local_address="127.0.0.2")
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=120) as one,
        httpx.AsyncClient(base_url=server.url, timeout=120, transport=transport) as other,
    ):
        alone = [await ask(one, body) for body in (*crowd, *few)]
        asked = [asyncio.create_task(ask(other, body)) for body in crowd]
        together = [await ask(one, body) for body in few]
        together = [*await asyncio.gather(*asked), *together]
    for expected, got in zip(alone, together, strict=True):
        assert got == pytest.approx(expected, abs=1e-4)
