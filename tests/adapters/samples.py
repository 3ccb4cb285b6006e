"""Adapters drawn at random, and the plain dense float64 arithmetic that the package must agree with."""

import math
from collections.abc import Mapping

import torch
from hypothesis import settings, strategies as st
from torch import Tensor

from adapters import LoraAdapter, LoraModule, Recipe, make_adapter

settings.register_profile("fusion", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("fusion")

SHAPES = {
    "model.layers.0.self_attn.q_proj": (12, 10),
    "model.layers.0.self_attn.v_proj": (7, 10),
    "model.layers.1.self_attn.q_proj": (12, 10),
    "model.layers.1.mlp.down_proj": (10, 14),
}
"""(d_out, d_in) of a small base."""

BASE = "a-small-base"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapter(
    seed: int,
    ranks: Mapping[str, int] | int = 3,
    scaling: float = 2.0,
    dtype: torch.dtype = torch.float32,
    base: str | None = BASE,
) -> LoraAdapter:
    """Normal factors for the given modules (one rank: all modules)."""
    chance = torch.Generator().manual_seed(seed)
    wanted = dict.fromkeys(SHAPES, ranks) if isinstance(ranks, int) else ranks
    modules = {}
    for name, rank in wanted.items():
        d_out, d_in = SHAPES[name]
        a = torch.randn(rank, d_in, generator=chance).to(dtype)
        b = torch.randn(d_out, rank, generator=chance).to(dtype)
        modules[name] = LoraModule(a, b, scaling)
    return make_adapter(modules, base)


def dense(adapter: LoraAdapter) -> dict[str, Tensor]:
    """ΔW = s·B·A of every module of the base, float64, zeros where the adapter has none."""
    found = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for name, module in adapter.modules.items():
        found[name] = module.scaling * (module.b.double() @ module.a.double())
    return found


def plain_weights(recipe: Recipe) -> dict[str, float]:
    """The weights of a recipe without schedules."""
    plain = {name: weight for name, weight in recipe.weights.items() if isinstance(weight, float)}
    assert len(plain) == len(recipe.terms)
    return plain


def dense_sum(recipe: Recipe, adapters: Mapping[str, LoraAdapter]) -> dict[str, Tensor]:
    """Σ w·ΔW, float64."""
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for name, weight in plain_weights(recipe).items():
        for module, delta in dense(adapters[name]).items():
            total[module] += weight * delta
    return total


def size(deltas: Mapping[str, Tensor]) -> float:
    """Frobenius norm over all modules."""
    return math.sqrt(sum(float(delta.square().sum()) for delta in deltas.values()))


def gap(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """Frobenius norm of the difference."""
    return size({name: one[name] - two[name] for name in one})


def same(one: LoraAdapter, two: LoraAdapter) -> bool:
    """Whether both have the same content to the last bit, and the same base."""
    return (
        one.digest == two.digest
        and one.base == two.base
        and list(one.modules) == list(two.modules)
        and all(
            torch.equal(m.a, two.modules[n].a)
            and torch.equal(m.b, two.modules[n].b)
            and m.a.dtype == two.modules[n].a.dtype
            and m.scaling == two.modules[n].scaling
            for n, m in one.modules.items()
        )
    )


names = st.sampled_from(["a", "b", "task", "safety-v1.2", "Z_9"])
weights = st.floats(-16, 16, allow_nan=False).filter(lambda w: w == 0 or abs(w) > 1e-3)
rank_maps = st.dictionaries(st.sampled_from(list(SHAPES)), st.integers(1, 5), min_size=1)


@st.composite
def families(draw: st.DrawFn) -> dict[str, LoraAdapter]:
    """One to four adapters of mixed ranks, scalings and modules."""
    chosen = draw(st.lists(names, unique=True, min_size=1, max_size=4))
    return {
        name: adapter(draw(st.integers(0, 10**6)), draw(rank_maps), draw(st.sampled_from([0.5, 1.0, 2.0, 16 / 3])))
        for name in chosen
    }
