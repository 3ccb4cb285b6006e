"""Angles between adapters, the picture of them, and the search for a rank."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from adapters import FusionError, LoraAdapter, LoraModule, diff, fuse, make_adapter, parse, plan, smallest_rank
from adapters.algebra.heatmap import write_heatmap
from tests.adapters.samples import SHAPES, adapter, families

MODULE = "model.layers.3.self_attn.q_proj"


def rank_one(column: list[float], row: list[float]) -> LoraAdapter:
    return make_adapter({MODULE: LoraModule(torch.tensor([row]), torch.tensor(column)[:, None], 2.0)}, None)


@pytest.mark.parametrize("degrees", [0.0, 1e-5, 0.5, 30.0, 45.0, 80.0, 90.0])
def test_principal_angles_of_rank_one_updates_are_the_angles_of_their_vectors(degrees: float) -> None:
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    one = rank_one([1.0, 0, 0], [0.0, 1, 0, 0])
    turned = torch.stack([angle.cos(), angle.sin(), torch.zeros(())]).to(torch.float64)
    two = make_adapter({MODULE: LoraModule(torch.tensor([[0.0, 0, 1, 0]]), turned[:, None], 1.0)}, None)
    (row,) = diff(one, two).modules
    assert row.column_angles == pytest.approx((degrees,), abs=1e-7)
    assert row.row_angles == pytest.approx((90.0,))


def test_an_adapter_shares_its_spaces_with_itself_whatever_the_factors() -> None:
    only = adapter(1, 3)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).Q
    same = make_adapter({n: LoraModule(turn @ m.a, m.b @ turn.T, m.scaling) for n, m in only.modules.items()}, None)
    for row in diff(only, same).modules:
        assert row.cosine == pytest.approx(1)
        assert row.distance < 1e-5 * row.norm_a
        assert max(*row.column_angles, *row.row_angles) < 1e-3


def test_a_module_one_adapter_lacks_has_no_angles() -> None:
    first, *_ = SHAPES
    rows = {row.module: row for row in diff(adapter(1, {first: 2}), adapter(2, 2)).modules}
    assert rows[first].column_angles
    assert not rows[list(SHAPES)[1]].column_angles


def test_the_heat_map_is_a_picture(tmp_path: Path) -> None:
    write_heatmap(diff(adapter(1), adapter(2)), tmp_path / "d.png")
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    plain = make_adapter({"head": LoraModule(torch.ones(1, 2), torch.ones(3, 1), 1.0)}, None)
    with pytest.raises(FusionError, match="layer number"):
        write_heatmap(diff(plain, plain), tmp_path / "e.png")


@given(families(), st.sampled_from(["sum", "ties", "knots", "dare_linear"]), st.floats(0, 0.9))
def test_the_smallest_rank_keeps_the_promise_and_one_less_does_not(
    family: dict[str, LoraAdapter], method: str, max_error: float
) -> None:
    body = " + ".join(f"0.{i + 3}*{name}" for i, name in enumerate(family))
    recipe = parse(f"{method}({body}, rank=60)" if method in ("ties", "dare_linear") else f"{method}({body})")
    rank = smallest_rank(recipe, family, max_error=max_error)
    assert plan(recipe, family, max_rank=rank).error <= max_error + 1e-6
    if rank > 1:
        assert plan(recipe, family, max_rank=rank - 1).error > max_error - 1e-6


def test_a_recipe_that_cuts_deeper_by_itself_is_named() -> None:
    family = {"a": adapter(1, 4)}
    assert smallest_rank(parse("svd(a, rank=2)"), family, max_error=0.9) <= 2
    with pytest.raises(FusionError, match="itself loses"):
        smallest_rank(parse("svd(a, rank=2)"), family, max_error=0.001)
    with pytest.raises(FusionError, match="max_error"):
        smallest_rank(parse("a"), family, max_error=1.5)
    assert fuse(parse("a"), family, max_rank=smallest_rank(parse("a"), family, max_error=0))[1].exact
