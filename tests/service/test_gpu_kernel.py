"""The GPU's kernels without a GPU: Triton interprets them, in a process of its own, since it decides that on import."""

import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

CASES = {
    "decode, qkv, two slots": (5, 96, (40, 24, 24), 8, 2, 3),
    "one token, one slot": (1, 300, (200,), 16, 1, 1),
    "prefill, inputs and outputs beyond a block": (70, 130, (130, 10), 20, 3, 2),
    "a rank beyond a block": (3, 64, (32,), 80, 2, 1),
}
"""Tokens, inputs, outputs of each slice, rank, slots, slices with rows of their own."""


def _check(tokens: int, d_in: int, outputs: tuple[int, ...], rank: int, slots: int, row_sets: int) -> None:
    from service.engine.gpu_kernel import add_update

    draw = torch.Generator().manual_seed(0)
    a = [torch.randn(slots, 1, rank, d_in, generator=draw) for _ in outputs]
    b = [torch.randn(slots, 1, n, rank, generator=draw) for n in outputs]
    rows = torch.randn(row_sets, 7, rank, generator=draw)
    rows[:, 0] = 0
    index = torch.randint(0, 7, (80,), generator=draw)
    places = torch.randint(-1, slots, (80,), generator=draw, dtype=torch.int32)
    x = torch.randn(tokens, d_in, generator=draw)
    y = torch.randn(tokens, sum(outputs), generator=draw)
    expected = y.double()
    for t in range(tokens):
        start = 0
        for i, n in enumerate(outputs):
            if (slot := int(places[t])) >= 0:
                weights = rows[min(i, row_sets - 1), index[t]].double()
                h = torch.where(weights == 0, 0, x[t].double() @ a[i][slot, 0].double().T * weights * 0.5)
                expected[t, start : start + n] += h @ b[i][slot, 0].double().T
            start += n
    untouched = y.clone()
    add_update(y, x, a, b, rows, index, places, torch.tensor([True]), 0.5)
    assert torch.equal(y, untouched)
    add_update(y, x, a, b, rows, index, places, torch.tensor([False]), 0.5)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def output() -> str:
    """What a process that checks all cases says of them: to start one takes longer than they do."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.service.test_gpu_kernel"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES)
def test_kernels_add_the_weighted_update_of_each_tokens_slot(output: str, case: str) -> None:
    """Base tokens, several slots, rows by slice, sizes off the blocks' borders."""
    assert f"{case}: right\n" in output, output[-4000:]


if __name__ == "__main__":
    for name, numbers in CASES.items():
        try:
            _check(*numbers)
            print(f"{name}: right", flush=True)
        except Exception:
            traceback.print_exc()
