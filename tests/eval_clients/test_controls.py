"""Controls: which points they are taken from, and the random adapter, on plain values."""

import httpx
import pytest
import torch

from adapters.recipes import parse
from eval_clients.endpoint import Endpoint
from eval_clients.errors import EndpointError
from eval_clients.sweeps.controls import build_controls, format_model, pick_evenly
from eval_clients.sweeps.points import Point, expand
from eval_clients.sweeps.random_adapter import randomize


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ("1*task", "1*task"),
        ("0.6*task", "0.6*task"),
        ("0.4*safety + 0.6*task", "0.4*safety + 0.6*task"),
        ("svd(1*task, rank=8)", "svd(task, rank=8)"),
    ],
)
def test_a_single_adapter_is_named_with_its_weight(recipe: str, text: str) -> None:
    assert format_model(parse(recipe)) == text


def test_controls_are_taken_from_inside_the_grid() -> None:
    points = expand(["{1-l}*t + {l}*s"], ["l=0:1:0.1"])
    assert [point.values["l"] for point in pick_evenly(points, 3)] == [0.2, 0.5, 0.8]
    assert pick_evenly(points[:2], 3) == points[:2]


def test_a_random_adapter_has_the_norms_and_nothing_else_of_the_other() -> None:
    torch.manual_seed(0)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.randn(4, 30), name.format("B"): torch.randn(20, 4)}
    random = randomize(tensors, seed=0)
    old, new = (x[name.format("B")] @ x[name.format("A")] for x in (tensors, random))
    assert torch.isclose(new.norm(), old.norm(), rtol=1e-5)
    assert abs((old * new).sum() / old.norm() ** 2) < 0.2
    assert all(torch.equal(value, randomize(tensors, seed=0)[key]) for key, value in random.items())
    assert not torch.equal(random[name.format("A")], randomize(tensors, seed=1)[name.format("A")])


class Listing(Endpoint):
    """A service that lists its names and takes no adapters."""

    def base(self) -> str:
        return "m"

    def adapters(self) -> list[str]:
        return ["task", "safety"]

    def request(self, method: str, path: str, **options: object) -> httpx.Response:
        raise EndpointError("no adapters are taken")


@pytest.mark.parametrize(
    ("models", "single"),
    [
        (["answer(0.6*task + 0.4*safety)"], ["answer(1*task)", "answer(1*safety)"]),
        (["answer(0.6*task + 0.4*safety)", "0.9*task"], ["1*task", "answer(1*safety)"]),
    ],
)
def test_an_adapter_that_acts_on_answers_only_does_so_alone(models: list[str], single: list[str]) -> None:
    points = [Point(model, "sweep", "s") for model in models]
    found, _ = build_controls(Listing("http://127.0.0.1:9/v1"), points, "safety")
    assert [point.model for point in found if point.series == "single adapter"] == single


@pytest.mark.parametrize(
    ("model", "controls"),
    [
        ("0.9*task + fade(1..0.2, 8)*safety", {"safety adapter left out": "0.9*task"}),
        ("answer(0.6*task + 0.4*safety)", {"safety adapter left out": "answer(0.6*task)"}),
        (
            "gate(answer(1*task + 0.8*safety), by=risk, safety in 0..0.8)",
            {"safety adapter left out": "answer(task)", "gate left out": "answer(0.8*safety + 1*task)"},
        ),
    ],
)
def test_controls_of_functions_keep_what_is_around(model: str, controls: dict[str, str]) -> None:
    found, notes = build_controls(Listing("http://127.0.0.1:9/v1"), [Point(model, "sweep", "s")], "safety")
    named = {point.series: point.model for point in found if point.series not in ("base", "single adapter")}
    assert named == controls
    assert notes == ["the random control is left out: no adapters are taken"]
