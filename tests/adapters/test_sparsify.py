"""What every sparsifier must have, and the random numbers behind it."""

import hashlib
import math

import pytest
import torch
from hypothesis import given, strategies as st

from adapters.algebra.sparsify import SPARSIFY, Draw, kth_by_bits
from tests.adapters import samples  # noqa: F401  (loads the hypothesis profile)


@pytest.mark.parametrize("kind", list(SPARSIFY))
def test_density_one_is_the_identity(kind: str) -> None:
    update = torch.randn(20, 30)
    options = {"density": 1.0, "epsilon": 0.1, "gamma": 0.1}
    assert torch.equal(SPARSIFY[kind](update, Draw(0, "digest", "module"), options), update)


@pytest.mark.parametrize("kind", ["magnitude", "breadcrumbs"])
@pytest.mark.parametrize("density", [0.01, 0.25, 0.5, 0.9])
def test_the_kept_share_is_the_density(kind: str, density: float) -> None:
    update = torch.randn(50, 40)
    kept = SPARSIFY[kind](update, Draw(0, "d", "m"), {"density": density, "gamma": 0.02})
    assert int((kept != 0).sum()) == int(density * update.numel())


def test_magnitude_keeps_exactly_so_many_even_when_all_are_equal() -> None:
    kept = SPARSIFY["magnitude"](torch.ones(7, 9), Draw(0, "d", "m"), {"density": 0.4})
    assert int(kept.sum()) == int(0.4 * 63)


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (300, 500)])
def test_random_numbers_are_splitmix64s(shape: tuple[int, int]) -> None:
    whole = (1 << 64) - 1
    key = int.from_bytes(hashlib.sha256(b"5/digest/module").digest()[:8], "little")

    def reference(place: int) -> int:
        z = (key + (place + 1) * 0x9E3779B97F4A7C15) & whole
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & whole
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & whole
        return z ^ (z >> 31)

    drawn = Draw(5, "digest", "module").uniform(torch.empty(shape)).flatten().tolist()
    half = (len(drawn) + 1) // 2
    for i in {0, half // 3, half - 1}:  # two blocks of the largest shape
        assert drawn[i] == (reference(i) >> 40) / 2**24
        if i + half < len(drawn):
            assert drawn[i + half] == (reference(i) & 0xFFFFFF) / 2**24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.lists(st.sampled_from([0.0, 1e-40, 1e-9, 0.5, 1.0, 1.5, 3e38]), min_size=1, max_size=40), st.data())
def test_selection_by_bits_is_selection(dtype: torch.dtype, values: list[float], data: st.DataObject) -> None:
    flat = torch.tensor(values, dtype=dtype)
    count = data.draw(st.integers(1, len(values)))
    assert kth_by_bits(flat, count) == flat.sort(descending=True).values[count - 1]


@pytest.mark.parametrize("kind", ["random", "magprune"])
def test_the_mean_over_draws_is_the_update(kind: str) -> None:
    update = torch.randn(30, 40, dtype=torch.float64)
    options = {"density": 0.4, "epsilon": 0.15}
    draws = [SPARSIFY[kind](update, Draw(seed, "d", "m"), options) for seed in range(400)]
    share = sum(float((draw != 0).double().mean()) for draw in draws) / len(draws)
    assert share == pytest.approx(0.4, abs=0.005)
    error = (torch.stack(draws).mean(0) - update).norm() / update.norm()
    assert float(error) < 3 * math.sqrt((1 / 0.25 - 1) / 400)
