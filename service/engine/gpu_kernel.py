"""The update of a LoRA layer on a GPU, in two kernels: shrink, and expand with each token's weights.

vLLM's own takes four (zero a buffer, shrink into it with atomic adds, weigh, expand), and while tokens are few a
kernel's start is most of its time. Here the shrink writes partial sums over parts of the inputs, and the expand adds
them up: no buffer has to be zero, and the order of a sum never changes. Tokens are matched with slots by number.
"""

import torch
import triton
import triton.language as tl

FEW_TOKENS = 64
"""Up to so many, blocks are of 16 tokens: the more programs, the sooner all have their numbers."""
MOST_TOKENS = 64
MOST_RANK = 64
OUTPUTS = 128
INPUTS = 128
PROGRAMS = 128
"""About as many as a GPU has multiprocessors: inputs are cut until there are as many."""
LOADED = 8192
"""Partial sums that a program loads at once."""
_tables: dict[tuple[int, ...], torch.Tensor] = {}


@triton.jit  # type: ignore[untyped-decorator]  # its arguments have Triton's types, which annotations cannot say
def _shrink(  # type: ignore[no-untyped-def]  # Triton's own types
    x_ptr, a_ptrs, part_ptr, slot_ptr, tokens, d_in, rank, chunk, x_row,
    block: tl.constexpr, ranks: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    """part [parts, slices, tokens, rank] = x[:, a part of the inputs] A^T, for the tokens of one slot."""
    blocks, rank_blocks = tl.cdiv(tokens, block), tl.cdiv(rank, ranks)
    part, slot = tl.program_id(0) // blocks, tl.program_id(2)
    own, slices = tl.program_id(1) // rank_blocks, tl.num_programs(1) // rank_blocks
    t = tl.program_id(0) % blocks * block + tl.arange(0, block)
    r = tl.program_id(1) % rank_blocks * ranks + tl.arange(0, ranks)
    mine = tl.load(slot_ptr + t, mask=t < tokens, other=-1) == slot
    if tl.max(mine.to(tl.int32), 0) > 0:
        a_ptr = tl.load(a_ptrs + own).to(tl.pointer_type(x_ptr.dtype.element_ty)) + slot.to(tl.int64) * rank * d_in
        total = tl.zeros((block, ranks), dtype=tl.float32)
        for start in range(part * chunk, tl.minimum((part + 1) * chunk, d_in), step):
            k = start + tl.arange(0, step)
            inside = k < d_in
            x = tl.load(x_ptr + t[:, None] * x_row + k[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
            a = tl.load(a_ptr + r[None, :] * d_in + k[:, None], mask=inside[:, None] & (r < rank)[None, :], other=0.0)
            total = tl.dot(x, a, total, input_precision="ieee")
        place = ((part * slices + own) * tokens + t)[:, None] * rank + r[None, :]
        tl.store(part_ptr + place, total, mask=mine[:, None] & (r < rank)[None, :])


@triton.jit  # type: ignore[untyped-decorator]  # likewise
def _expand(  # type: ignore[no-untyped-def]  # Triton's own types
    y_ptr, part_ptr, rows_ptr, index_ptr, b_ptrs, start_ptr, slot_ptr, tokens, rank, parts, scale,
    y_row, slice_stride, row_stride,
    block: tl.constexpr, ranks: tl.constexpr, columns: tl.constexpr, together: tl.constexpr,
):  # fmt: skip
    """y[:, a slice's outputs] += (sum of part * weights * scale) B^T, for the tokens of one slot."""
    blocks, own, slot = tl.cdiv(tokens, block), tl.program_id(1), tl.program_id(2)
    first = tl.load(start_ptr + own)
    width = tl.load(start_ptr + own + 1) - first
    t = tl.program_id(0) % blocks * block + tl.arange(0, block)
    n = tl.program_id(0) // blocks * columns + tl.arange(0, columns)
    mine = tl.load(slot_ptr + t, mask=t < tokens, other=-1) == slot
    if (tl.program_id(0) // blocks * columns < width) & (tl.max(mine.to(tl.int32), 0) > 0):
        b_ptr = tl.load(b_ptrs + own).to(tl.pointer_type(y_ptr.dtype.element_ty)) + slot.to(tl.int64) * width * rank
        row = tl.load(index_ptr + t, mask=mine, other=0)
        update = tl.zeros((block, columns), dtype=tl.float32)
        for r0 in range(0, rank, ranks):
            r = r0 + tl.arange(0, ranks)
            inside = mine[:, None] & (r < rank)[None, :]
            place = (own * tokens + t)[:, None] * rank + r[None, :]
            h = tl.zeros((block, ranks), dtype=tl.float32)
            for p0 in range(0, parts, together):  # several loads at once: one alone waits for memory
                p = p0 + tl.arange(0, together)
                places = p[:, None, None] * tl.num_programs(1) * tokens * rank + place[None, :, :]
                some = tl.load(part_ptr + places, mask=(p < parts)[:, None, None] & inside[None, :, :], other=0.0)
                h += tl.sum(some, 0)
            weight_place = own * slice_stride + row[:, None] * row_stride + r[None, :]
            weight = tl.load(rows_ptr + weight_place, mask=inside, other=0.0)
            h = tl.where(weight == 0.0, 0.0, h * weight * scale)  # zero times infinity would be NaN
            b_place = n[None, :] * rank + r[:, None]
            b = tl.load(b_ptr + b_place, mask=(r < rank)[:, None] & (n < width)[None, :], other=0.0)
            update = tl.dot(h.to(b.dtype), b, update, input_precision="ieee")
        place = t[:, None] * y_row + (first + n)[None, :]
        inside = mine[:, None] & (n < width)[None, :]
        y = tl.load(y_ptr + place, mask=inside, other=0.0)
        tl.store(y_ptr + place, (y + update).to(y.dtype), mask=inside)


def _send(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """`numbers` on the device, sent once: vLLM's profile run asks for all of them before graphs are captured."""
    if numbers not in _tables:
        _tables[numbers] = torch.tensor(numbers, dtype=torch.int64, device=device)
    return _tables[numbers]


def add_update(
    y: torch.Tensor,
    x: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    rows: torch.Tensor,
    index: torch.Tensor,
    slots: torch.Tensor,
    idle: torch.Tensor,
    scale: float,
) -> None:
    """y [tokens, d_out] += ((x A^T) * weights * scale) B^T, each token with the factors in its slot.

    `a` [slots, 1, rank, d_in] and `b` [slots, 1, outputs, rank] of each slice, contiguous, in the dtype of x and y;
    `rows` float32 [1 or slices, capacity, rank], of which `index` int64 [max tokens] has each token's; `slots` int32
    [max tokens], -1 for the base; `idle` bool [1] on the CPU, true when no token has a slot.
    """
    if not len(x) or idle.item():
        return
    (tokens, d_in), rank, slices, device = x.shape, a[0].shape[-2], len(a), x.device
    block = 16 if tokens <= FEW_TOKENS else MOST_TOKENS
    width = min(max(16, triton.next_power_of_2(rank)), MOST_RANK)
    blocks, rank_blocks = triton.cdiv(tokens, block), triton.cdiv(rank, width)
    cuts = max(1, PROGRAMS // (blocks * rank_blocks * slices))
    chunk = triton.cdiv(triton.cdiv(d_in, cuts), INPUTS) * INPUTS
    parts = triton.cdiv(d_in, chunk)
    part = torch.empty(parts, slices, tokens, rank, dtype=torch.float32, device=device)
    x = x if x.stride(1) == 1 else x.contiguous()
    outputs = [factor.shape[-2] for factor in b]
    starts = _send((0, *(sum(outputs[: i + 1]) for i in range(slices))), device)
    a_ptrs, b_ptrs = (_send(tuple(factor.data_ptr() for factor in side), device) for side in (a, b))
    grid = parts * blocks, slices * rank_blocks, len(a[0])
    _shrink[grid](x, a_ptrs, part, slots, tokens, d_in, rank, chunk, x.stride(0), block, width, INPUTS)
    grid = triton.cdiv(max(outputs), OUTPUTS) * blocks, slices, len(a[0])
    slice_stride = rows.stride(0) if len(rows) > 1 else 0
    strides = y.stride(0), slice_stride, rows.stride(1)
    together = min(LOADED // (block * width), triton.next_power_of_2(parts))
    _expand[grid](
        y, part, rows, index, b_ptrs, starts, slots, tokens, rank, parts, scale, *strides,
        block, width, OUTPUTS, together,
    )  # fmt: skip
