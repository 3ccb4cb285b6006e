"""What each low-rank method makes of one module's updates, called directly."""

import math

import pytest
import torch
from torch import Tensor

from adapters import METHODS, LoraAdapter, LoraModule, make_adapter
from adapters.algebra.combine import (
    Context,
    WeightedUpdate,
    add,
    alignment,
    column_space,
    knots,
    safe_merge,
    safe_project,
    slerp,
)
from tests.adapters.reference import projector

MODULE = "m"


def update(name: str, b: Tensor, a: Tensor, *, weight: float = 1.0, scaling: float = 2.0) -> WeightedUpdate:
    module = LoraModule(a, b, scaling)
    return WeightedUpdate(name, make_adapter({MODULE: module}, None), weight, module)


def drawn(name: str, seed: int, *, weight: float = 1.0, rank: int = 3) -> WeightedUpdate:
    chance = torch.Generator().manual_seed(seed)
    return update(name, torch.randn(8, rank, generator=chance), torch.randn(rank, 6, generator=chance), weight=weight)


def context(method: str, options: dict[str, float | int | str], roles: dict[str, LoraModule | None]) -> Context:
    row = METHODS[method]
    return Context(MODULE, row, row.filled(options), roles, None)


def total(terms: list[tuple[float, LoraModule]]) -> Tensor:
    whole = torch.zeros(8, 6, dtype=torch.float64)
    for weight, module in terms:
        whole += weight * module.scaling * (module.b.double() @ module.a.double())
    return whole


def dense(one: WeightedUpdate) -> Tensor:
    return total([(one.weight, one.module)])


def test_the_factor_of_an_update_is_weight_times_scaling() -> None:
    assert drawn("a", 1, weight=0.5).factor == 1.0


def test_an_adapter_draws_its_own_numbers_in_each_module_and_factor() -> None:
    one, two = drawn("a", 1), drawn("b", 2)
    known = context("dare_linear", {"seed": 5}, {})
    draws = [known.draw(one), known.draw(two), known.draw(one, ".lora_A"), known.draw(one, ".lora_B")]
    assert len(set(draws)) == 4
    same: LoraAdapter = make_adapter({MODULE: one.module}, None)
    assert known.draw(WeightedUpdate("other name", same, 0.1, one.module)) == known.draw(one)


def test_a_sum_keeps_its_terms() -> None:
    updates = [drawn("a", 1, weight=0.6), drawn("b", 2, weight=-0.4)]
    terms = add(updates, context("sum", {}, {}))
    assert [weight for weight, _ in terms] == [0.6, -0.4]
    assert all(module is one.module for (_, module), one in zip(terms, updates, strict=True))


def test_slerp_is_straight_where_an_update_lacks_the_module() -> None:
    only = drawn("b", 2, weight=0.5)
    terms = slerp([only], context("slerp", {"t": 0.25, "from": "a"}, {}))
    torch.testing.assert_close(total(terms), 0.25 * dense(only))
    assert slerp([only], context("slerp", {"t": 0.0, "from": "a"}, {})) == []


def test_slerp_is_straight_between_opposite_updates() -> None:
    one = drawn("a", 1)
    opposite = WeightedUpdate("b", one.adapter, -1.0, one.module)
    terms = slerp([one, opposite], context("slerp", {"t": 0.25, "from": "a"}, {}))
    torch.testing.assert_close(total(terms), 0.5 * dense(one))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_column_space_is_an_orthonormal_basis_of_what_the_update_writes(rank: int) -> None:
    module = drawn("a", 1, rank=rank).module
    doubled = LoraModule(torch.cat([module.a, module.a]), torch.cat([module.b, module.b], dim=1), 1.0)
    basis = column_space(doubled)
    assert basis.shape == (8, rank)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(basis @ basis.T, projector(total([(1.0, module)])))


def test_alignment_is_the_cosine_with_the_projection() -> None:
    direction = drawn("d", 3, rank=2)
    whole = dense(drawn("a", 1)) + dense(drawn("b", 2))
    cosine = float((projector(dense(direction)) @ whole).norm() / whole.norm())
    assert alignment([drawn("a", 1), drawn("b", 2)], direction.module) == pytest.approx(cosine)
    assert alignment([direction], direction.module) == pytest.approx(1.0)
    zero = update("z", torch.zeros(8, 1), torch.zeros(1, 6))
    assert alignment([zero], direction.module) == 1.0


def test_safe_merge_leaves_a_module_alone_that_the_safety_adapter_lacks() -> None:
    options: dict[str, float | int | str] = {"safety": "s", "threshold": 1.0}
    one, safety = drawn("a", 1), drawn("s", 2)
    assert safe_merge([one], context("safe_merge", options, {"safety": None})) == [(1.0, one.module)]
    assert safe_merge([], context("safe_merge", options, {"safety": safety.module})) == []
    merged = safe_merge([one], context("safe_merge", options, {"safety": safety.module}))
    torch.testing.assert_close(total(merged), 0.5 * dense(one) + 0.5 * dense(safety))


def test_safe_project_leaves_nothing_of_a_module_that_the_direction_lacks_unless_nothing_drifts() -> None:
    one = drawn("a", 1)
    for threshold, terms in ((1.0, []), (0.3, []), (0.0, [(1.0, one.module)])):
        known = context("safe_project", {"direction": "d", "threshold": threshold}, {"direction": None})
        assert safe_project([one], known) == terms


def test_knots_at_full_density_of_one_adapter_is_its_weighted_update() -> None:
    one = drawn("a", 1, weight=0.7)
    (term,) = knots([one], context("knots", {"density": 1.0}, {}))
    torch.testing.assert_close(total([term]), dense(one))
    assert term[1].rank == 3
    assert math.isclose(term[1].scaling, 1.0)


def test_knots_of_nothing_is_nothing() -> None:
    zero = update("z", torch.zeros(8, 2), torch.zeros(2, 6))
    assert knots([], context("knots", {}, {})) == knots([zero], context("knots", {}, {})) == []
