"""The compiled update of few tokens: what it adds, and to which tokens."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from vllm.lora.layers import LoRAMapping

from service.engine.cpu_kernel import BLOCK, CHUNK, WIDTH, Blocks, add_update, cut
from service.engine.factors import WIDE_RANK, pack, pack_embedding
from service.engine.punica import MixedPunicaCPU
from service.engine.rows import RowStore


def draw_factors(
    rng: np.random.Generator, d_in: int, widths: list[int], rank: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Factors whose coordinates are in part unused, other ones in each slice."""
    a = [torch.from_numpy(rng.normal(size=(rank, d_in)).astype(np.float32)) for _ in widths]
    b = [torch.from_numpy(rng.normal(size=(width, rank)).astype(np.float32)) for width in widths]
    for factor in b:
        factor[:, torch.from_numpy(rng.random(rank) < 0.5)] = 0
    b[0][0, rng.integers(rank)] = 1
    return a, b


def make_blocks(a: list[torch.Tensor], b: list[torch.Tensor]) -> Blocks:
    """Blocks of slices with these factors."""
    return cut(a, b, [factor.any(dim=0).numpy() for factor in b])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    d_in=st.integers(1, 70),
    widths=st.lists(st.integers(1, 2 * WIDTH + 9), min_size=1, max_size=3),
    rank=st.integers(1, 2 * BLOCK + 5),
    count=st.sampled_from([0, 1, 3, 17, CHUNK, 2 * CHUNK + 5]),
    by_slice=st.booleans(),
)
def test_it_adds_the_weighted_update_to_its_tokens_alone(
    seed: int, d_in: int, widths: list[int], rank: int, count: int, by_slice: bool
) -> None:
    rng = np.random.default_rng(seed)
    a, b = draw_factors(rng, d_in, widths, rank)
    total, capacity = count + 3, 6
    rows = rng.normal(size=(len(widths) if by_slice else 1, capacity, rank)).astype(np.float32)
    index, tokens = rng.integers(capacity, size=total), np.sort(rng.permutation(total)[:count])
    x = torch.from_numpy(rng.normal(size=(total, d_in)).astype(np.float32))
    before = torch.from_numpy(rng.normal(size=(total, sum(widths))).astype(np.float32))
    y, expected = before.clone(), before.double()
    add_update(y, x, make_blocks(a, b), rows, index, tokens)
    for t in tokens:
        parts = [
            b_i.double()
            @ (torch.from_numpy(rows[i if by_slice else 0, index[t]]).double() * (a_i.double() @ x[t].double()))
            for i, (a_i, b_i) in enumerate(zip(a, b, strict=True))
        ]
        expected[t] += torch.cat(parts)
    assert torch.allclose(y.double(), expected, atol=1e-3, rtol=1e-5)
    others = np.setdiff1d(np.arange(total), tokens)
    assert torch.equal(y[others], before[others])


def test_a_weight_of_zero_leaves_every_bit_and_stops_infinities() -> None:
    a, b = [torch.full((3, 8), 3e38)], [torch.randn(10, 3)]
    x, before = torch.full((2, 8), 3e38), torch.randn(2, 10)
    y = before.clone()
    add_update(y, x, make_blocks(a, b), np.zeros((1, 2, 3), np.float32), np.array([0, 1]), np.array([0, 1]))
    assert torch.equal(y, before)


def test_coordinates_that_are_not_used_have_no_blocks() -> None:
    a, b = [torch.randn(32, 5)] * 2, [torch.zeros(7, 32), torch.zeros(9, 32)]
    b[0][3, 30], b[1][2, [4, 11, 12]] = 1, 1
    assert make_blocks(a, b).places.tolist() == [[0, 7, 0, 30, 0], [7, 16, 1, 4, 1], [7, 16, 1, 12, 2]]


def make_wrapper(ids: list[int | None], tokens: list[int], rank: int, most: int) -> Any:
    config = SimpleNamespace(max_lora_rank=rank, max_loras=len(ids))
    wrapper = MixedPunicaCPU(256, len(tokens), "cpu", lora_config=config)
    wrapper.update_metadata(LoRAMapping(tuple(tokens), tuple(tokens), is_prefill=False), ids, len(ids) + 1, 1000)
    wrapper._most_tokens = most  # noqa: SLF001 - of how many threads there are
    return wrapper


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("rank", [BLOCK, WIDE_RANK + BLOCK])
@pytest.mark.parametrize("tokens", [[7] * 5, [7, 0, 7, 7, 0], [8, 7, 0, 8, 7], [0] * 5])
def test_the_kernel_and_matrix_products_give_the_same(
    tokens: list[int], rank: int, uniform: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, widths = np.random.default_rng(0), [20, 12, 12]
    both = [draw_factors(rng, 24, widths, rank) for _ in range(2)]
    a, b = [tuple(torch.stack(f)[:, None] for f in zip(*(pair[i] for pair in both), strict=True)) for i in range(2)]
    x, before = torch.randn(len(tokens), 24), torch.randn(len(tokens), sum(widths))
    store = RowStore(["q", "k", "v"], 8, rank, "cpu")
    store.rows[:, 2:].uniform_()
    if uniform:
        store.rows[:] = store.rows[:1].clone()
    index, results, calls = np.array([0 if not t else 2 + i for i, t in enumerate(tokens)]), [], []

    def count(*args: Any) -> None:
        calls.append(1)
        add_update(*args)

    monkeypatch.setattr("service.engine.punica.add_update", count)
    for most in (5, 4):
        wrapper, y = make_wrapper([7, 8], tokens, rank, most), before.clone()
        wrapper.fusion_store = store
        wrapper.set_rows(index, uniform)
        wrapper.add_lora_linear(y, x, a, b, 1.0, tuple(widths), rows=store.rows)
        results.append(y)
    by_kernel, by_products = results
    assert torch.allclose(by_kernel, by_products, atol=1e-4)
    assert len(calls) == len(set(tokens) - {0}), "the first by the kernel, the second without"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_have_no_blocks(dtype: torch.dtype) -> None:
    factor = torch.ones(1, 1, 2, 2, dtype=dtype)
    packed = pack((factor,), (factor,), (2,), 0)
    assert packed is not None
    assert packed.blocks is None


def test_inputs_that_are_not_the_steps_tokens_go_to_matrix_products() -> None:
    """The kernel checks no bounds: a tensor of other shape or layout than expected must not reach it."""
    wrapper = make_wrapper([7], [7, 7, 7], 4, 64)
    blocks = make_blocks([torch.randn(4, 6)], [torch.randn(5, 4)])
    fits = wrapper._is_for_kernel  # noqa: SLF001 - what is tested
    x, y = torch.zeros(3, 6), torch.zeros(3, 5)
    assert fits(y, x, blocks)
    assert not fits(y[:2], x[:2], blocks)
    assert not fits(y[None], x[None], blocks)
    assert not fits(y, torch.zeros(3, 7), blocks)
    assert not fits(torch.zeros(3, 6), x, blocks)
    assert not fits(y, torch.zeros(6, 3).t(), blocks)
    assert not fits(y.half(), x, blocks)


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_packed_has_memory_of_its_own(rank: int, dtype: torch.dtype) -> None:
    a, b = torch.ones(1, 1, rank, 4, dtype=dtype), torch.ones(1, 1, 3, rank, dtype=dtype)
    packed, embedding = pack((a,), (b,), (3,), 0), pack_embedding(b, 0)
    assert packed is not None
    assert embedding is not None
    a.zero_(), b.zero_()
    for tensor in (packed.a, *(part.b_t for part in packed.parts), embedding):
        assert bool(tensor.all()), "the next adapter in the slot would change it"
