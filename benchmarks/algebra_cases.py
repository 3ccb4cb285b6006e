"""What the algebra's benchmarks fuse, random factors in the shapes of real models, and PEFT's side of it."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import peft
import torch
from torch import nn

from adapters import LoraAdapter, LoraModule, Recipe, fuse, make_adapter

LLAMA_2_7B = {
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
LLAMA_3_70B = {
    "self_attn.q_proj": (8192, 8192),
    "self_attn.k_proj": (1024, 8192),
    "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192),
    "mlp.gate_proj": (28672, 8192),
    "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
}
QV = {name: LLAMA_2_7B[name] for name in ("self_attn.q_proj", "self_attn.v_proj")}
LAYERS_7B, LAYERS_70B = 32, 80


def draw_adapter(seed: int, shapes: dict[str, tuple[int, int]], layers: int, rank: int) -> LoraAdapter:
    """A random adapter, float32, alpha = 2·rank."""
    chance = torch.Generator().manual_seed(seed)
    modules = {}
    for layer in range(layers):
        for name, (d_out, d_in) in shapes.items():
            a = torch.randn(rank, d_in, generator=chance).mul_(0.02)
            b = torch.randn(d_out, rank, generator=chance).mul_(0.02)
            modules[f"model.layers.{layer}.{name}"] = LoraModule(a, b, 2.0)
    return make_adapter(modules, None)


def time_call(work: Callable[[], object]) -> float:
    """Seconds that one call of `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure_rate(recipe: Recipe, parents: Mapping[str, LoraAdapter], device: str | None) -> float:
    """Fusions a second, from one."""
    return 1 / time_call(lambda: fuse(recipe, parents, device=device))


class Layer(nn.Module):
    """A base of one linear layer."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.q_proj = nn.Linear(shape[1], shape[0], bias=False)

    def prepare_inputs_for_generation(self) -> None:
        """PEFT requires the method of a causal language model."""


def prepare_peft(method: str, parents: Sequence[LoraAdapter], rank: int, **options: object) -> Callable[[], float]:
    """A function that gives the seconds PEFT takes to fuse one q_proj of `parents` in memory."""
    modules = [adapter.modules["model.layers.0.self_attn.q_proj"] for adapter in parents]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = modules[0].rank
        config = peft.LoraConfig(r=own, lora_alpha=2 * own, target_modules=["q_proj"])
        model = peft.get_peft_model(Layer(modules[0].shape), config, adapter_name="p0")
        for i in range(1, len(modules)):
            model.add_adapter(f"p{i}", config)
    for i, module in enumerate(modules):
        model.base_model.model.q_proj.lora_A[f"p{i}"].weight.data.copy_(module.a)
        model.base_model.model.q_proj.lora_B[f"p{i}"].weight.data.copy_(module.b)
    names, weights = [f"p{i}" for i in range(len(modules))], [0.6, 0.4, *[0.5] * len(modules)][: len(modules)]

    def run() -> float:
        spent = time_call(
            lambda: model.add_weighted_adapter(names, weights, "mix", combination_type=method, svd_rank=rank, **options)
        )
        model.delete_adapter("mix")
        return spent

    return run
