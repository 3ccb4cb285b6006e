"""Linear algebra on factors against plain dense float64."""

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from adapters.algebra.lowrank import (
    DENSE_LIMIT,
    GramFactors,
    Truncation,
    cholesky_qr,
    choose_signs,
    decompose,
    inner,
    inner_products,
    truncate,
    truncate_dense,
)
from tests.adapters import samples  # noqa: F401  (loads the hypothesis profile)
from tests.adapters.reference import best

sizes = st.integers(1, 12)


@st.composite
def factors(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """B, A and scale of some modules, now and then with dependent columns."""
    n, d_out, d_in, k = draw(st.integers(1, 3)), draw(sizes), draw(sizes), draw(sizes)
    chance = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    b = torch.randn(n, d_out, k, generator=chance, dtype=torch.float64)
    a = torch.randn(n, k, d_in, generator=chance, dtype=torch.float64)
    scale = torch.randn(n, 1, k, generator=chance, dtype=torch.float64)
    if draw(st.booleans()):
        b[:, :, -1] = b[:, :, 0]
    return b, a, scale


def product(truncation: Truncation) -> Tensor:
    assert truncation.factors is not None
    return truncation.factors.b.double() @ truncation.factors.a.double()


@given(factors())
def test_the_inner_product_of_factors_is_that_of_their_products(case: tuple[Tensor, Tensor, Tensor]) -> None:
    b, a, scale = case
    one, two = (b[0] * scale[0]) @ a[0], b[-1] @ a[-1]
    assert inner(b[0] * scale[0], a[0], b[-1], a[-1]) == pytest.approx(float((one * two).sum()), abs=1e-9)


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_inner_products_of_columns_are_safe_from_overflow(size: float) -> None:
    chance = torch.Generator().manual_seed(0)
    b, a = torch.randn(2, 9, 3, generator=chance), torch.randn(2, 3, 7, generator=chance)
    rank_one = torch.einsum("nik,nkj->nkij", b.double() * size, a.double())
    wanted = torch.einsum("nkij,nlij->nkl", rank_one, rank_one)
    torch.testing.assert_close(inner_products(b * size, a), wanted, rtol=1e-5, atol=1e-5 * size**2)


@given(factors())
def test_a_decomposition_is_orthonormal_and_gives_the_product_back(case: tuple[Tensor, Tensor, Tensor]) -> None:
    b, a, scale = case
    d = decompose(GramFactors.compute(b, a, scale))
    whole, left, right = (b * scale) @ a, d.left @ d.u, d.vh @ d.right
    torch.testing.assert_close(left @ (d.sigma[..., None] * right), whole, rtol=0, atol=1e-7 * float(whole.norm()))
    assert bool((d.sigma.diff(dim=-1) <= 0).all())
    for i, sigma in enumerate(d.sigma):
        count = int((sigma > 1e-9 * sigma[0]).sum())
        eye = torch.eye(count, dtype=torch.float64)
        torch.testing.assert_close(left[i, :, :count].T @ left[i, :, :count], eye, rtol=0, atol=1e-6)
        torch.testing.assert_close(right[i, :count] @ right[i, :count].T, eye, rtol=0, atol=1e-6)


@given(factors(), sizes)
def test_a_truncation_is_the_best_of_its_rank_and_counts_what_is_lost(
    case: tuple[Tensor, Tensor, Tensor], limit: int
) -> None:
    b, a, scale = case
    x = GramFactors.compute(b, a, scale)
    for i, cut in enumerate(truncate(x, limit)):
        whole = (b[i] * scale[i]) @ a[i]
        energies = torch.linalg.svdvals(whole).square()
        assert cut.rank <= limit
        assert cut.kept_energy == pytest.approx(float(energies[:limit].sum()), rel=1e-7, abs=1e-9)
        assert cut.lost_energy == pytest.approx(float(energies[limit:].sum()), rel=1e-6, abs=1e-9)
        assert float((product(cut) - whole).norm()) ** 2 == pytest.approx(cut.lost_energy, rel=1e-5, abs=1e-9)


@given(factors(), sizes)
def test_planning_a_truncation_gives_the_same_numbers(case: tuple[Tensor, Tensor, Tensor], limit: int) -> None:
    x = GramFactors.compute(*case)
    built, planned = truncate(x, limit), truncate(x, limit, build=False)
    assert [(cut.rank, cut.kept_energy, cut.lost_energy) for cut in built] == [
        (cut.rank, cut.kept_energy, cut.lost_energy) for cut in planned
    ]
    assert all(cut.factors is None for cut in planned)


def test_dependent_columns_are_left_to_householder() -> None:
    x = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factored = cholesky_qr(x.mT @ x)
    assert factored is not None
    r, inverse = factored
    torch.testing.assert_close(x @ inverse @ r, x)
    x[1, :, 3] = x[1, :, 0] * (1 + 1e-12)
    assert cholesky_qr(x.mT @ x) is None
    x[1, :, 3] = 0
    assert cholesky_qr(x.mT @ x) is None


def test_signs_make_the_largest_entry_of_a_column_positive() -> None:
    left = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 1.0, -3.0]])
    assert choose_signs(left).tolist() == [-1.0, -1.0, 1.0]


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (DENSE_LIMIT + 76, DENSE_LIMIT + 176)])
@pytest.mark.parametrize("build", [False, True])
def test_a_dense_matrix_is_truncated_to_its_best(shape: tuple[int, int], build: bool) -> None:
    chance = torch.Generator().manual_seed(0)
    w = torch.randn(shape[0], 12, generator=chance) @ torch.randn(12, shape[1], generator=chance)
    w += 1e-3 * torch.randn(shape, generator=chance)
    wanted = best(w.double(), 8)
    lost = float((w.double() - wanted).square().sum())
    cut = truncate_dense(w, 8, build=build)
    assert cut.rank == 8
    assert cut.lost_energy == pytest.approx(lost, rel=1e-4)
    assert cut.kept_energy == pytest.approx(float(wanted.square().sum()), rel=1e-4)
    if build:
        assert float((product(cut) - wanted).norm()) < 1e-3 * float(wanted.norm())


@pytest.mark.parametrize("build", [False, True])
def test_a_matrix_of_zeros_keeps_one_rank_and_loses_nothing(build: bool) -> None:
    cut = truncate_dense(torch.zeros(4, 6), 3, build=build)
    assert (cut.rank, cut.kept_energy, cut.lost_energy) == (1, 0.0, 0.0)
