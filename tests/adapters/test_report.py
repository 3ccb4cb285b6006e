"""The report of a fusion: how its parents compare, and what it says."""

import pytest
import torch

from adapters import LoraModule, fuse, make_adapter, parse, plan
from tests.adapters import reference
from tests.adapters.samples import SHAPES, adapter, dense, dense_sum, gap, size


def test_the_report_compares_the_parents() -> None:
    family = {"a": adapter(1, 3), "b": adapter(2, 2)}
    report = plan(parse("0.6*a + -0.4*b"), family)
    for row in report.modules:
        a, b = (dense(one)[row.module] for one in family.values())
        assert row.norms == pytest.approx({"a": float(a.norm()), "b": float(b.norm())})
        assert row.cosine == pytest.approx(-reference.cosine(a, b), abs=1e-6)
        assert row.conflict == pytest.approx(float((a * -b < 0).double().mean()), abs=1e-9)
    assert "conflict" in report.table()


def test_methods_that_merge_a_and_b_separately_say_so() -> None:
    family = {"a": adapter(1, 3), "b": adapter(2, 3)}
    fused, report = fuse(parse("peft_linear(0.6*a + 0.4*b)"), family)
    whole = dense_sum(parse("0.6*a + 0.4*b"), family)
    assert "approximate" in report.verdict
    assert not report.exact
    assert report.departure == pytest.approx(gap(dense(fused), whole) / size(whole), rel=1e-5)
    assert report.to_json()["departure"] == report.departure


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_the_report_holds_for_very_small_and_very_large_numbers(scale: float) -> None:
    """Their squares are beyond float32."""
    plain = {"a": adapter(1, 3), "b": adapter(2, 2)}
    scaled = {
        name: make_adapter({k: LoraModule(m.a, m.b * scale, m.scaling) for k, m in one.modules.items()}, None)
        for name, one in plain.items()
    }
    recipe = parse("0.6*a + 0.4*b")
    for row, same in zip(plan(recipe, scaled).modules, plan(recipe, plain).modules, strict=True):
        assert row.norms == pytest.approx({name: norm * scale for name, norm in same.norms.items()}, rel=1e-5)
        assert row.cosine == pytest.approx(same.cosine, abs=1e-6)
        assert row.conflict == same.conflict


def test_conflicts_in_a_large_module_are_counted_where_lines_cross() -> None:
    chance = torch.Generator().manual_seed(0)
    found = {
        name: make_adapter(
            {"q": LoraModule(torch.randn(4, 700, generator=chance), torch.randn(900, 4, generator=chance), 1.0)}, None
        )
        for name in "ab"
    }
    (row,) = plan(parse("1*a + 1*b"), found).modules
    a, b = (dense(one)["q"] for one in found.values())
    assert row.conflict == pytest.approx(float((a * b < 0).double().mean()), abs=0.02)


def test_report_says_it_in_text_and_json() -> None:
    report = plan(parse("a"), {"a": adapter(1, 6)}, max_rank=2)
    assert "relative error" in report.verdict
    assert report.verdict in report.table()
    assert all(name in report.table() for name in SHAPES)
    assert report.to_json()["verdict"] == report.verdict
    assert plan(parse("a"), {"a": adapter(1, 6)}).verdict == "exact at rank 6"
