"""Controls: which points they are taken from, and the random adapter, on plain values."""

import pytest
import torch

from adapters.recipes import parse
from eval_clients.sweeps.controls import format_model, pick_evenly
from eval_clients.sweeps.points import expand
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
