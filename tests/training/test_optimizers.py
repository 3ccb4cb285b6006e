"""The learning rate, AdamW with bf16 moments, and the scale of float16 losses."""

import math
from pathlib import Path

import pytest
import torch

from training.loop.optimizers import AdamWBf16, LossScale, learning_rate, make_optimizer
from training.recipe import load_recipe


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "step"])
def test_rates_warm_up_and_follow_their_schedule(orders_recipe: Path, schedule: str) -> None:
    config, _ = load_recipe(orders_recipe, [f"train.schedule={schedule}", "train.warmup=0.1", "train.epochs=10"])
    rates = [learning_rate(config.train, step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3)
    assert max(rates) == rates[9] == pytest.approx(1e-2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    expected = {"cosine": 0.0, "linear": 0.0, "constant": 1e-2, "step": 1e-2 * 0.85**9}[schedule]
    assert learning_rate(config.train, 99, 100, 10) == pytest.approx(expected, abs=2e-4)


def test_bf16_states_follow_adamw_and_small_updates_are_not_lost(orders_recipe: Path) -> None:
    torch.manual_seed(0)
    gradients = torch.randn(200, 64) + 0.3
    ends = []
    for kind, dtype in (("adamw", torch.float32), ("adamw-bf16", torch.float32), ("adamw-bf16", torch.bfloat16)):
        config, _ = load_recipe(orders_recipe, [f"policy.optimizer={kind}", "train.weight_decay=0.01"])
        value = torch.nn.Parameter(torch.ones(64, dtype=dtype))
        optimizer = make_optimizer({"x": value}, config)
        optimizer.param_groups[0]["lr"] = 1e-4  # far below bf16's spacing at 1, 8e-3
        for gradient in gradients:
            value.grad = gradient.to(dtype)
            optimizer.step()
        ends.append(value.detach().float())
    assert isinstance(optimizer, AdamWBf16)
    assert bool((ends[0] < 0.998).all())
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=2e-4)
    torch.testing.assert_close(ends[2], ends[0], rtol=0, atol=5e-3)


def test_a_loss_scale_halves_at_an_overflow_and_grows_again() -> None:
    scale = LossScale(8.0, growth_interval=2, dynamic=True)
    assert [scale.update(norm) for norm in (1.0, math.inf, math.nan, 1.0, 1.0)] == [True, False, False, True, True]
    assert scale.value == 4.0
    for _ in range(2):
        assert not scale.update(math.inf)
        assert not (scale.value > 1 and scale.exhausted)
    assert scale.value == 1.0
    assert scale.exhausted
    assert scale.update(1.0)
    assert scale.update(1.0)
    assert scale.value == 2.0
    plain = LossScale()
    assert plain.exhausted
    assert all(plain.update(1.0) for _ in range(2000))
    assert plain.value == 1.0
