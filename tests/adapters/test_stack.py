"""The stack: any weighted sum of its adapters is its factors times one row."""

import pytest
import torch
from hypothesis import given, strategies as st

from adapters import AdapterError, FusionError, LoraAdapter, UnknownAdapterError, stack, stack_rank
from tests.adapters.samples import SHAPES, adapter, dense, families, gap, size, weights


@given(families(), st.data())
def test_factors_times_the_row_equal_the_sum(family: dict[str, LoraAdapter], data: st.DataObject) -> None:
    side_by_side = stack(family)
    chosen = data.draw(st.dictionaries(st.sampled_from(sorted(family)), weights))
    row = torch.tensor(side_by_side.row(chosen), dtype=torch.float64)
    mixed = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for name, module in side_by_side.adapter.modules.items():
        mixed[name] = module.b.double() @ torch.diag(row) @ module.a.double()
    wanted = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for adapter_name, weight in chosen.items():
        for name, delta in dense(family[adapter_name]).items():
            wanted[name] += weight * delta
    scale = sum(abs(w) * size(dense(family[n])) for n, w in chosen.items())
    assert gap(mixed, wanted) <= 1e-6 * scale


@given(families())
def test_every_adapter_owns_one_range_of_its_largest_rank(family: dict[str, LoraAdapter]) -> None:
    side_by_side = stack(family)
    stops = [0]
    for name in sorted(family):
        start, stop = side_by_side.ranges[name]
        assert start == stops[-1]
        assert stop - start == family[name].rank
        stops.append(stop)
    assert stops[-1] == side_by_side.rank == stack_rank(family)
    modules = side_by_side.adapter.modules
    assert set(modules) == {name for one in family.values() for name in one.modules}
    assert {(m.rank, m.scaling, m.a.dtype, m.b.dtype) for m in modules.values()} == {
        (side_by_side.rank, 1.0, torch.float32, torch.float32)
    }


def test_the_order_of_the_mapping_does_not_matter() -> None:
    one, two = adapter(1, 2), adapter(2, 3)
    assert stack({"a": one, "b": two}).adapter.digest == stack({"b": two, "a": one}).adapter.digest


def test_a_row_has_zeros_for_those_not_named() -> None:
    side_by_side = stack({"a": adapter(1, 2), "b": adapter(2, 1), "c": adapter(3, 2)})
    assert side_by_side.row({"b": 0.5, "a": -1}) == [-1.0, -1.0, 0.5, 0.0, 0.0]
    assert side_by_side.row({}) == [0.0] * 5


def test_strangers_and_misfits_are_refused() -> None:
    with pytest.raises(UnknownAdapterError):
        stack({"a": adapter(1)}).row({"b": 1.0})
    with pytest.raises(AdapterError):
        stack({"a": adapter(1), "b": adapter(2, base="another")})
    with pytest.raises(FusionError, match="at least one"):
        stack({})
