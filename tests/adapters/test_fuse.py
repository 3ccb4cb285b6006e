"""The algebra against plain dense float64 arithmetic."""

import math

import pytest
import torch
from hypothesis import assume, given, strategies as st

from adapters import (
    AdapterError,
    FusionError,
    LoraAdapter,
    LoraModule,
    LossError,
    Recipe,
    Term,
    UnknownAdapterError,
    diff,
    fuse,
    make_adapter,
    parse,
    plan,
)
from tests.adapters.samples import SHAPES, adapter, dense, dense_sum, families, gap, plain_weights, size, weights

Family = dict[str, LoraAdapter]


def magnitude(recipe: Recipe, family: Family) -> float:
    """Σ |w|·‖ΔW‖: the scale that rounding is measured by, also when weights cancel."""
    return sum(abs(w) * size(dense(family[name])) for name, w in plain_weights(recipe).items())


@st.composite
def sums(draw: st.DrawFn) -> tuple[Recipe, Family]:
    family = draw(families())
    return Recipe("sum", tuple(Term(name, draw(weights)) for name in family)), family


@given(sums())
def test_a_sum_is_the_dense_sum(case: tuple[Recipe, Family]) -> None:
    recipe, family = case
    fused, report = fuse(recipe, family)
    assert gap(dense(fused), dense_sum(recipe, family)) <= 1e-6 * magnitude(recipe, family)
    assert report.exact
    assert report.error == 0.0
    assert report.energy == 1.0
    assert all(module.scaling == 1.0 for module in fused.modules.values())
    assert report.bytes == fused.nbytes
    assert report.rank == fused.rank


@given(sums())
def test_weight_minus_one_negates(case: tuple[Recipe, Family]) -> None:
    recipe, family = case
    negated = Recipe("sum", tuple(Term(name, -weight) for name, weight in plain_weights(recipe).items()))
    one, two = fuse(recipe, family)[0], fuse(negated, family)[0]
    for name, module in one.modules.items():
        assert torch.equal(module.delta(), -two.modules[name].delta())


@given(sums(), st.randoms())
def test_the_order_does_not_matter(case: tuple[Recipe, Family], random: object) -> None:
    recipe, family = case
    terms, known = list(recipe.terms), list(family.items())
    random.shuffle(terms)  # type: ignore[attr-defined]  # hypothesis' own Random
    random.shuffle(known)  # type: ignore[attr-defined]  # hypothesis' own Random
    again, report = fuse(Recipe("sum", tuple(terms)), dict(known), max_rank=3)
    first, expected = fuse(recipe, family, max_rank=3)
    assert again.digest == first.digest
    assert report == expected


@given(families())
def test_one_adapter_at_weight_one_is_itself(family: Family) -> None:
    name, only = next(iter(family.items()))
    fused, report = fuse(parse(name), family)
    assert list(fused.modules) == list(only.modules)
    assert fused.rank == only.rank
    assert gap(dense(fused), dense(only)) <= 1e-6 * size(dense(only))
    assert report.exact


@given(families())
def test_what_cancels_is_a_valid_adapter_of_zeros(family: Family) -> None:
    name, only = next(iter(family.items()))
    twins = {name: only, "twin": only}
    for fused, report in (
        fuse(Recipe("sum", (Term(name, 0.3), Term("twin", -0.3))), twins),
        fuse(Recipe("svd", (Term(name, 0.3), Term("twin", -0.3)), (("rank", 1),)), twins),
        fuse(Recipe("sum", (Term(name, 0.0), Term("twin", 0.0))), twins),
    ):
        assert size(dense(fused)) <= 1e-6 * size(dense(only))
        assert fused.rank >= 1
        assert report.error == 0.0
        assert report.exact
        assert list(fused.modules) == list(only.modules)


def test_weight_zero_adds_neither_rank_nor_modules() -> None:
    one, other = list(SHAPES)[:2]
    family = {"a": adapter(1, {one: 2}), "b": adapter(2, {one: 3, other: 3})}
    fused, report = fuse(parse("1*a + 0*b"), family)
    assert list(fused.modules) == [one]
    assert fused.rank == 2
    assert report.recipe == "1*a + 0*b"


@given(sums(), st.integers(1, 6))
def test_svd_is_as_good_as_the_dense_best(case: tuple[Recipe, Family], rank: int) -> None:
    recipe, family = case
    whole = dense_sum(recipe, family)
    assume(size(whole) > 1e-3 * magnitude(recipe, family))
    fused, report = fuse(Recipe("svd", recipe.terms, (("rank", rank),)), family)
    best = math.sqrt(sum(float(torch.linalg.svdvals(w)[rank:].square().sum()) for w in whole.values()))
    assert gap(dense(fused), whole) <= best + 1e-5 * size(whole)
    assert report.error == pytest.approx(best / size(whole), abs=1e-6)
    assert report.energy == pytest.approx(1 - report.error**2)
    assert fused.rank <= rank


@given(sums(), st.integers(1, 6))
def test_a_sum_over_the_rank_limit_is_the_svd_at_the_limit(case: tuple[Recipe, Family], rank: int) -> None:
    recipe, family = case
    capped, report = fuse(recipe, family, max_rank=rank)
    cut, expected = fuse(Recipe("svd", recipe.terms, (("rank", rank),)), family)
    assert capped.digest == cut.digest
    assert report.modules == expected.modules
    assert report.error == expected.error


@given(sums(), st.integers(1, 6) | st.none())
def test_a_plan_is_the_report_of_the_fusion(case: tuple[Recipe, Family], rank: int | None) -> None:
    recipe, family = case
    assert plan(recipe, family, max_rank=rank) == fuse(recipe, family, max_rank=rank)[1]


def test_dependent_directions_go_first_and_cost_nothing() -> None:
    only = adapter(3, 4)
    fused, report = fuse(parse("0.5*a + 0.25*b"), {"a": only, "b": only}, max_rank=4)
    assert report.exact
    assert report.error == 0.0
    assert report.rank == 4
    assert {row.rank_before for row in report.modules} == {8}
    wanted = {name: 0.75 * delta for name, delta in dense(only).items()}
    assert gap(dense(fused), wanted) <= 1e-6 * size(wanted)


def test_the_smaller_of_rank_and_max_rank_wins() -> None:
    family = {"a": adapter(1, 5), "b": adapter(2, 5)}
    assert fuse(parse("svd(a + b, rank=4)"), family, max_rank=2)[0].rank == 2
    assert fuse(parse("svd(a + b, rank=2)"), family, max_rank=4)[0].rank == 2


def test_error_counts_modules_that_lost_nothing() -> None:
    one, other = list(SHAPES)[:2]
    family = {"a": adapter(1, {one: 6, other: 2})}
    recipe = parse("a")
    fused, report = fuse(recipe, family, max_rank=3)
    whole = dense_sum(recipe, family)
    assert report.error == pytest.approx(gap(dense(fused), whole) / size(whole), rel=1e-4)
    by_name = {row.module: row for row in report.modules}
    assert by_name[other].error == 0.0
    assert by_name[one].error > report.error > 0.0
    assert not report.exact


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_adapters_dtype_comes_out(dtype: torch.dtype) -> None:
    family = {"a": adapter(1, 3, 1.5, dtype), "b": adapter(2, 2, 0.5, dtype)}
    for recipe in (parse("0.6*a + 0.4*b"), parse("svd(0.6*a + 0.4*b, rank=5)")):
        fused, report = fuse(recipe, family, max_rank=5)
        whole = dense_sum(recipe, family)
        assert fused.dtype == dtype
        assert gap(dense(fused), whole) <= 2 * torch.finfo(dtype).eps * size(whole)
        assert report.bytes == fused.nbytes


def test_mixed_dtypes_are_promoted() -> None:
    family = {"a": adapter(1, 2, dtype=torch.bfloat16), "b": adapter(2, 2, dtype=torch.float16)}
    assert fuse(parse("a + b"), family)[0].dtype == torch.float32


def test_svd_signs_are_fixed() -> None:
    fused, _ = fuse(parse("svd(a, rank=2)"), {"a": adapter(5, 4)})
    mirrored = make_adapter({n: LoraModule(-m.a, -m.b, m.scaling) for n, m in adapter(5, 4).modules.items()}, None)
    other, _ = fuse(parse("svd(a, rank=2)"), {"a": mirrored})
    for name, module in fused.modules.items():
        peaks = module.b.gather(0, module.b.abs().argmax(dim=0, keepdim=True))
        assert (peaks > 0).all()
        assert torch.allclose(module.a, other.modules[name].a, atol=1e-6)


def test_strict_refuses_loss_and_only_loss() -> None:
    family = {"a": adapter(1, 4), "b": adapter(2, 4)}
    assert fuse(parse("a + b"), family, max_rank=8, strict=True)[1].exact
    for run in (fuse, plan):
        with pytest.raises(LossError, match="strict"):
            run(parse("a + b"), family, max_rank=4, strict=True)


def test_an_adapter_nobody_gave_is_named_with_the_nearest() -> None:
    with pytest.raises(UnknownAdapterError, match="did you mean 'safety'") as caught:
        fuse(parse("saftey"), {"safety": adapter(1), "task": adapter(2)})
    assert (caught.value.name, caught.value.nearest) == ("saftey", "safety")


def test_shapes_that_disagree_are_named() -> None:
    name = next(iter(SHAPES))
    wide = make_adapter({name: LoraModule(torch.ones(2, 11), torch.ones(12, 2), 1.0)}, None)
    with pytest.raises(AdapterError) as caught:
        fuse(parse("a + b"), {"a": adapter(1), "b": wide})
    assert caught.value.reason == "shape"
    assert all(part in str(caught.value) for part in (name, "(12, 10)", "(12, 11)"))


def test_bases_must_agree_when_both_are_known() -> None:
    family = {"a": adapter(1), "b": adapter(2, base="another"), "c": adapter(3, base=None)}
    assert fuse(parse("a + c"), family)[0].base == family["a"].base
    with pytest.raises(AdapterError) as caught:
        fuse(parse("a + b"), family)
    assert caught.value.reason == "base"


@pytest.mark.parametrize("max_rank", [0, -1, True, 2.0])
def test_a_senseless_rank_limit_is_refused(max_rank: int) -> None:
    with pytest.raises(FusionError, match="max_rank"):
        plan(parse("a"), {"a": adapter(1)}, max_rank=max_rank)


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(AdapterError) as caught:
        fuse(parse("16*a"), {"a": adapter(1, 2, 30000.0, torch.float16)})
    assert caught.value.reason == "overflow"


def test_delta_is_the_dense_product_and_names_a_missing_module() -> None:
    only = adapter(1, dtype=torch.bfloat16)
    name = next(iter(SHAPES))
    assert only.delta(name).dtype == torch.float32
    assert torch.allclose(only.delta(name).double(), dense(only)[name], atol=1e-5)
    with pytest.raises(FusionError, match="nowhere"):
        only.delta("nowhere")


@given(sums())
def test_diff_agrees_with_dense_norms(case: tuple[Recipe, Family]) -> None:
    recipe, family = case
    one, two = family[recipe.adapters[0]], family[recipe.adapters[-1]]
    found = diff(one, two)
    assert found.norm_a == pytest.approx(size(dense(one)))
    assert found.norm_b == pytest.approx(size(dense(two)))
    assert found.distance == pytest.approx(gap(dense(one), dense(two)), abs=1e-6 * found.norm_a)
    dot = sum(float((dense(one)[n] * dense(two)[n]).sum()) for n in SHAPES)
    assert found.cosine == pytest.approx(dot / (found.norm_a * found.norm_b), abs=1e-9)
