"""Attention of packed rows."""

import pytest
import torch

from training.loop.attention import attend, attend_masked, make_mask


@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("heads", [2, 4])
def test_one_masked_product_equals_the_products_of_the_rows(shared: int, heads: int) -> None:
    """What GPUs compute against what CPUs do, with fewer key heads than query heads too."""
    lengths = (5, 1, 7)
    width = shared + sum(lengths)
    query, key, value = (torch.randn(1, n, width, 8, dtype=torch.float64) for n in (4, heads, heads))
    apart, _ = attend(torch.nn.Identity(), query, key, value, None, row_lengths=lengths, shared=shared)
    together = attend_masked(query, key, value, make_mask((shared, *lengths), query.device))
    torch.testing.assert_close(together, apart)
