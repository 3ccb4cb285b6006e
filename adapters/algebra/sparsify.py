"""Make one update sparse: which entries stay, and by how much the rest is scaled.

Every function takes a tensor of any shape, its `Draw` (randomness keyed by the adapter, never by its place
in the recipe) and the method's options, and returns a new tensor of the same shape and dtype. At density 1
each is the identity. Dense updates are large: passes over them are what takes the time.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.recipes.method import Value


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))
_BITS = (1 << 24) - 1
CPU_BLOCK, GPU_BLOCK = 1 << 16, 1 << 26


@dataclass(frozen=True, slots=True)
class Draw:
    """The key of the random numbers for one adapter's update of one module."""

    seed: int
    digest: str
    module: str

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform float32 in [0, 1) of `like`'s shape, 24 random bits each, the same on every device.

        Number i is half of SplitMix64's i-th (https://doi.org/10.1145/2714064.2660195): a function of i alone, so that
        a GPU computes all at once and a CPU in blocks that stay in its cache.
        """
        digest = hashlib.sha256(f"{self.seed}/{self.digest}/{self.module}".encode()).digest()
        key = int.from_bytes(digest[:8], "little", signed=True)
        half = (like.numel() + 1) // 2
        drawn = torch.empty(2, half, dtype=torch.float32, device=like.device)
        block = GPU_BLOCK if like.is_cuda else CPU_BLOCK
        for start in range(0, half, block):
            z = torch.arange(start, min(start + block, half), dtype=torch.int64, device=like.device)
            z.add_(1).mul_(_GOLDEN).add_(key)
            for shift, factor in _MIX:
                z.bitwise_xor_((z >> shift).bitwise_and_((1 << 64 - shift) - 1)).mul_(factor)
            z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))
            part = slice(start, start + len(z))
            drawn[0, part] = (z >> 40).bitwise_and_(_BITS)
            drawn[1, part] = z.bitwise_and_(_BITS)
        return drawn.mul_(2.0**-24).view(-1)[: like.numel()].view(like.shape)


Options = Mapping[str, Value]
Sparsify = Callable[[Tensor, Draw, Options], Tensor]


def largest(magnitudes: Tensor, count: int) -> Tensor:
    """Mask of exactly `count` largest entries of a non-negative tensor; of equal ones the first stay.

    The threshold is found by selection, not by sorting.
    """
    flat = magnitudes.reshape(-1)
    total = flat.numel()
    if count >= total:
        return torch.ones_like(magnitudes, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(magnitudes, dtype=torch.bool)
    mask = flat >= _kth_largest(flat.clone(), count)
    surplus = int(torch.count_nonzero(mask)) - count
    if surplus:  # entries equal to the smallest that stays
        equal = (flat == flat[mask].min()).nonzero()[:, 0]
        mask[equal[len(equal) - surplus :]] = False
    return mask.reshape(magnitudes.shape)


def _kth_largest(flat: Tensor, count: int) -> Tensor:
    """The `count`-th largest entry (0-dim); `flat` may end up in another order."""
    if flat.is_cuda:
        return kth_by_bits(flat, count)
    # numpy's introselect takes a tenth of the time of torch's topk and kthvalue on millions of entries.
    position = flat.numel() - count
    flat.numpy().partition(position)
    return flat[position].clone()


def kth_by_bits(flat: Tensor, count: int) -> Tensor:
    """The `count`-th largest of non-negative float32 or float64 numbers: they order as their bits do, which are
    determined one by one, in a pass each. A GPU's topk sorts instead.
    """
    whole = torch.int32 if flat.dtype == torch.float32 else torch.int64
    bits, threshold = flat.view(whole), 0
    for place in reversed(range(8 * whole.itemsize - 1)):
        candidate = threshold | 1 << place
        if int(torch.count_nonzero(bits >= candidate)) >= count:
            threshold = candidate
    return torch.tensor(threshold, dtype=whole, device=flat.device).view(flat.dtype)


def none(update: Tensor, draw: Draw, options: Options) -> Tensor:
    """The update unchanged."""
    return update


def magnitude(update: Tensor, draw: Draw, options: Options) -> Tensor:
    """The ⌊density·n⌋ entries of largest magnitude; the others become zero."""
    density = float(options["density"])
    if density >= 1:
        return update
    count = int(density * update.numel())
    if count and not update.is_cuda:  # two passes, where no two entries are equal at the threshold
        threshold = _kth_largest(update.abs().reshape(-1), count)
        topk = torch.nn.functional.hardshrink(update, float(torch.nextafter(threshold, torch.zeros(()).to(threshold))))
        if int(torch.count_nonzero(topk)) == count:
            return topk
    return torch.where(largest(update.abs(), count), update, 0)


def random(update: Tensor, draw: Draw, options: Options) -> Tensor:
    """Each entry stays with probability `density` and is divided by it, so that the mean is unchanged (DARE)."""
    density = float(options["density"])
    if density >= 1:
        return update
    return update * (draw.uniform(update) < density) / density


def magprune(update: Tensor, draw: Draw, options: Options) -> Tensor:
    """Within a row the keep probability grows with the rank of the magnitude, from density − ε to density + ε;
    what stays is divided by its probability, so that the mean is unchanged (DELLA).
    """
    density = float(options["density"])
    if density >= 1:
        return update
    spread = min(float(options["epsilon"]), 1 - density, density / 2)
    rows = update.reshape(-1, update.shape[-1])
    order = rows.abs().argsort(dim=1, stable=True)
    places = torch.arange(rows.shape[1], dtype=update.dtype, device=update.device).div_(max(1, rows.shape[1] - 1))
    share = torch.empty_like(rows).scatter_(1, order, places.expand_as(rows))
    keep = (density - spread + 2 * spread * share).reshape(update.shape)
    return update * (draw.uniform(update) < keep) / keep


def breadcrumbs(update: Tensor, draw: Draw, options: Options) -> Tensor:
    """⌊density·n⌋ entries stay: those of largest magnitude after the ⌊gamma·n⌋ largest of all are dropped."""
    density, total = float(options["density"]), update.numel()
    if density >= 1:
        return update
    count = int(density * total)
    outliers = min(int(float(options["gamma"]) * total), total - count)
    magnitudes = update.abs()
    return update * (largest(magnitudes, count + outliers) & ~largest(magnitudes, outliers))


SPARSIFY: Mapping[str, Sparsify] = {
    "none": none,
    "magnitude": magnitude,
    "random": random,
    "magprune": magprune,
    "breadcrumbs": breadcrumbs,
}
