"""One kernel for the whole update of a layer by few tokens, on CPUs.

A step that decodes multiplies some tens of tokens by factors of rank 8 or 16. Matrix products of that shape run at a
fifth of a core's speed and cost a call each; here the loops are compiled for them, tokens are never gathered, and each
reads its own weights. vLLM has the compiler (numba) among its requirements. Factors come in blocks of `BLOCK`
coordinates that one slice has: those that an adapter does not use in a module cost nothing.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

BLOCK = 8
WIDTH = 128
"""Outputs in a tile: 8 x 128 numbers stay in the first-level cache while all tokens use them."""
CHUNK = 64
"""Tokens whose inputs stay in the second-level cache while all blocks use them."""
FEW_THREADS = 2
"""Up to so many, matrix products of any number of tokens take longer than the kernel on its one thread."""

Function = TypeVar("Function", bound=Callable[..., None])


def _compile(function: Function) -> Function:
    # Sums may be reordered; infinities and NaN stay what they are.
    compiled: Function = njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")(function)
    return compiled


@dataclass(frozen=True, slots=True)
class Blocks:
    """One adapter's factors of one layer.

    `a` float32 [blocks, BLOCK, d_in]; `b` float32 [tiles, BLOCK, WIDTH]; `places` int64 [blocks, 5]: the outputs from
    which and to before which one a block acts, its slice, its first coordinate, its first tile. `d_in` and `d_out` are
    the layer's numbers of inputs and outputs.
    """

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    places: NDArray[np.int64]
    d_in: int
    d_out: int


def cut(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], used: Sequence[NDArray[np.bool_]]) -> Blocks:
    """Blocks of a layer whose slices have the factors `a` [rank, d_in] and `b` [d_out, rank], float32; `used` [rank]
    says which coordinates of a slice have a number in `b` that is not zero, of which there is one.
    """
    places, begin, tile = list[tuple[int, int, int, int, int]](), 0, 0
    for i, (b_i, used_i) in enumerate(zip(b, used, strict=True)):
        end, after = begin + len(b_i), 0
        for first in map(int, used_i.nonzero()[0]):
            if first >= after:
                places.append((begin, end, i, first, tile))
                after, tile = first + BLOCK, tile - len(b_i) // -WIDTH
        begin = end
    rows = np.zeros((len(places), BLOCK, a[0].shape[1]), np.float32)
    tiles = np.zeros((tile, BLOCK, WIDTH), np.float32)
    for row, (_, _, i, first, tile) in zip(rows, places, strict=True):
        own, b_own = used[i][first : first + BLOCK], b[i].numpy()[:, first : first + BLOCK]
        count, whole = len(own), len(b_own) // WIDTH
        row[:count] = a[i].numpy()[first : first + BLOCK]
        row[:count][~own] = 0
        divided = b_own[: whole * WIDTH].reshape(whole, WIDTH, count)
        tiles[tile : tile + whole, :count] = divided.swapaxes(1, 2)
        if len(rest := b_own[whole * WIDTH :]):
            tiles[tile + whole, :count, : len(rest)] = rest.T
    return Blocks(rows, tiles, np.array(places), a[0].shape[1], begin)


@_compile
def _shrink(u: Any, x: Any, a: Any, tokens: Any) -> None:
    """u [tokens, up to the next multiple of 4, BLOCK] = x a^T of these `tokens`; each number is read for 4 sums."""
    zero, last = np.float32(0), len(tokens) - 1
    for i in range(0, len(tokens), 4):
        x0, x1 = x[tokens[i]], x[tokens[min(i + 1, last)]]
        x2, x3 = x[tokens[min(i + 2, last)]], x[tokens[min(i + 3, last)]]
        for h in range(0, BLOCK, 4):
            a0, a1, a2, a3 = a[h], a[h + 1], a[h + 2], a[h + 3]
            s00, s01, s02, s03 = zero, zero, zero, zero
            s10, s11, s12, s13 = zero, zero, zero, zero
            s20, s21, s22, s23 = zero, zero, zero, zero
            s30, s31, s32, s33 = zero, zero, zero, zero
            for k in range(x.shape[1]):
                s00 += x0[k] * a0[k]
                s01 += x0[k] * a1[k]
                s02 += x0[k] * a2[k]
                s03 += x0[k] * a3[k]
                s10 += x1[k] * a0[k]
                s11 += x1[k] * a1[k]
                s12 += x1[k] * a2[k]
                s13 += x1[k] * a3[k]
                s20 += x2[k] * a0[k]
                s21 += x2[k] * a1[k]
                s22 += x2[k] * a2[k]
                s23 += x2[k] * a3[k]
                s30 += x3[k] * a0[k]
                s31 += x3[k] * a1[k]
                s32 += x3[k] * a2[k]
                s33 += x3[k] * a3[k]
            u[i, h], u[i, h + 1], u[i, h + 2], u[i, h + 3] = s00, s01, s02, s03
            u[i + 1, h], u[i + 1, h + 1], u[i + 1, h + 2], u[i + 1, h + 3] = s10, s11, s12, s13
            u[i + 2, h], u[i + 2, h + 1], u[i + 2, h + 2], u[i + 2, h + 3] = s20, s21, s22, s23
            u[i + 3, h], u[i + 3, h + 1], u[i + 3, h + 2], u[i + 3, h + 3] = s30, s31, s32, s33


@_compile
def _weigh(u: Any, rows: Any, index: Any, tokens: Any, first: int) -> None:
    """u [tokens, BLOCK] *= their rows, from coordinate `first` on; zero where the weight is, also of an infinity."""
    count = min(BLOCK, rows.shape[1] - first)
    for i in range(len(tokens)):
        row, u_i = rows[index[tokens[i]]], u[i]
        for h in range(count):
            weight = row[first + h]
            u_i[h] = u_i[h] * weight if weight != 0 else np.float32(0)


@_compile
def _expand(y: Any, u: Any, b: Any, tokens: Any, begin: int, end: int) -> None:
    """y [:, begin:end] += u b for these `tokens`; `b` is a tile [BLOCK * WIDTH]."""
    for i in range(len(tokens)):
        y_i, u_i = y[tokens[i], begin:end], u[i]
        u0, u1, u2, u3, u4, u5, u6, u7 = u_i[0], u_i[1], u_i[2], u_i[3], u_i[4], u_i[5], u_i[6], u_i[7]
        for j in range(len(y_i)):
            low = u0 * b[j] + u1 * b[WIDTH + j] + u2 * b[2 * WIDTH + j] + u3 * b[3 * WIDTH + j]
            high = u4 * b[4 * WIDTH + j] + u5 * b[5 * WIDTH + j] + u6 * b[6 * WIDTH + j] + u7 * b[7 * WIDTH + j]
            y_i[j] += low + high


@_compile
def _add(y: Any, x: Any, a: Any, b: Any, places: Any, rows: Any, index: Any, tokens: Any) -> None:
    u = np.empty((min(len(tokens) + 3, CHUNK), BLOCK), np.float32)  # CHUNK is a multiple of 4
    for chunk in range(0, len(tokens), CHUNK):
        some = tokens[chunk : chunk + CHUNK]
        for g in range(len(places)):
            begin, end, part, first, tile = places[g]
            _shrink(u, x, a[g], some)
            _weigh(u, rows[part if len(rows) > 1 else 0], index, some, first)
            for start in range(begin, end, WIDTH):
                _expand(y, u, b[tile].ravel(), some, start, min(start + WIDTH, end))
                tile += 1


def most_tokens() -> int:
    """Of how many tokens the kernel, which has one thread, adds the update sooner than matrix products do."""
    return CHUNK if torch.get_num_threads() > FEW_THREADS else sys.maxsize


def add_update(
    y: torch.Tensor,
    x: torch.Tensor,
    blocks: Blocks,
    rows: NDArray[np.float32],
    index: NDArray[np.int64],
    tokens: NDArray[np.int64],
) -> None:
    """y [all tokens, d_out] += ((x A^T) * weights) B^T for these `tokens` of x [all tokens, d_in], in place.

    The weights of token t are `rows` [1 or slices, capacity, rank] at `index[t]`. All float32 and contiguous; nothing
    is checked, so `tokens` and `index` must be within their bounds.
    """
    _add(y.numpy(), x.numpy(), blocks.a, blocks.b, blocks.places, rows, index, tokens)


def compile_kernel() -> None:
    """Compile it, in about a second; otherwise the first request would wait."""
    factors, number = torch.ones(1, 1), np.zeros(1, np.int64)
    blocks = cut([factors], [factors], [np.ones(1, np.bool_)])
    add_update(torch.zeros(1, 1), torch.zeros(1, 1), blocks, np.zeros((1, 1, 1), np.float32), number, number)
