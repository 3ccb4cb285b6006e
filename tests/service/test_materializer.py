"""Files made from stored adapters: plans and exports, without an engine."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters import load
from service.errors import ApiError
from tests.adapters import samples
from tests.service.conftest import World


def test_a_plan_says_how_and_at_what_cost_without_making_anything(world: Callable[..., World], tmp_path: Path) -> None:
    w = world()
    plans = [w.materializer.plan(f, w.pool.place(f)) for f in map(w.fusion, ("1*a + 1*b", "svd(1*a + 1*b, rank=1)"))]
    assert [(p["mode"], p["rank"]) for p in plans] == [("mixed", 6), ("built", 1)]
    assert plans[0]["error"] == 0 < plans[1]["error"]
    assert [p["reason"] for p in plans] == [None, "'svd' is not a weighted sum of its adapters in each module"]
    assert not list((tmp_path / "builds").iterdir())


def test_an_export_is_exact_even_over_the_rank_limit(world: Callable[..., World], tmp_path: Path) -> None:
    w = world()
    fusion = w.fusion("0.5*a + -1*d")
    folder = w.materializer.export(fusion, tmp_path)
    expected = samples.dense_sum(fusion.recipe, w.adapters)
    assert samples.gap(samples.dense(load(folder)), expected) < 1e-5 * samples.size(expected)
    assert json.loads((folder / "fusion_report.json").read_text())["rank"] > 16


@pytest.mark.parametrize(("text", "dtype"), [("0.6*x + 0.4*y", torch.float32), ("1*x + 2*y", torch.bfloat16)])
def test_an_export_is_in_no_dtype_that_would_round_it(
    world: Callable[..., World], tmp_path: Path, text: str, dtype: torch.dtype
) -> None:
    """r24."""
    w = world()
    for seed, name in enumerate("xy"):
        w.adapters[name] = samples.adapter(seed, dtype=torch.bfloat16)
        w.materializer.add(w.adapters[name])
    fusion = w.fusion(text)
    written = load(w.materializer.export(fusion, tmp_path))
    expected = samples.dense_sum(fusion.recipe, w.adapters)
    assert samples.gap(samples.dense(written), expected) < 1e-6 * samples.size(expected)
    assert written.dtype == dtype


def test_files_that_are_gone_are_reported_without_a_path(world: Callable[..., World], tmp_path: Path) -> None:
    w = world()
    w.materializer.remove(w.adapters["a"].digest)
    with pytest.raises(
        ApiError, match="are damaged; delete and re-register it.*they are gone from the store"
    ) as caught:
        w.materializer.source(w.adapters["a"].digest)
    assert str(tmp_path) not in caught.value.message


def test_a_plan_of_weights_by_position_has_a_report_for_each_phase(world: Callable[..., World]) -> None:
    w = world()
    fusion = w.fusion("fade(1..0, 3)*a + 0.5*b")
    plan = w.materializer.plan(fusion, w.pool.place(fusion))
    assert (plan["mode"], [phase["start"] for phase in plan["phases"]]) == ("mixed", ["prompt", 1, 2])
    assert [phase["rank"] for phase in plan["phases"]] == [6, 6, 2]
    assert "rank" not in plan
