"""What the headers say of a gate's decisions."""

import json
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from adapters import Readout, Recipe, from_json, parse
from service.decisions import MAX_HEADER, Decisions
from service.engine.models import LoRARequest
from service.metrics import Metrics
from service.resolve import Fusion

pytestmark = pytest.mark.anyio


async def make(_: Recipe) -> LoRARequest:
    return LoRARequest("x", 7, "/x")


def decisions(recipe: Recipe) -> Decisions:
    fusion = Fusion(recipe, {"g": "d"}, "f", "(inline)")
    return Decisions(fusion, Readout(5, 6), make, Metrics(CollectorRegistry()))


def read(made: Decisions) -> tuple[Any, str]:
    headers = dict(made.headers())
    assert sum(map(len, headers.values())) < MAX_HEADER + 100
    weights = headers.get(b"x-fusion-weights")
    return None if weights is None else json.loads(weights), headers[b"x-fusion-gate"].decode()


async def test_weights_are_listed_in_the_order_of_the_prompts() -> None:
    made = decisions(parse("gate(0.5*a, by=g, a in 0..1)"))
    first, second, third = (made.gate_pass().begin() for _ in range(3))
    assert not made.complete
    await third(100, "")
    await first(-100, "")
    assert (made.any, made.complete) == (True, False)
    await second(None, "it took more than 1 s")
    assert made.complete
    assert read(made) == ([{"a": 0.0}, {"a": 0.5}, {"a": 1.0}], "default: it took more than 1 s")


async def test_the_header_has_as_many_prompts_as_fit() -> None:
    made = decisions(parse("gate(0.5*a, by=g, a in 0..1)"))
    for _ in range(500):
        await made.begin()(0, "")
    weights, _ = read(made)
    assert 100 < len(weights) < 500


async def test_weights_that_do_not_fit_are_left_out() -> None:
    parts = [{"name": "a", "weight": 0.5}, {"name": "b", "weight": {"components": [0.5] * 1000}}]
    made = decisions(from_json({"adapters": parts, "gate": {"by": "g", "bounds": {"a": [0, 1]}}}))
    await made.begin()(0, "")
    assert read(made) == (None, "chose")
