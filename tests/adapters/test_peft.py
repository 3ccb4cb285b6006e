"""The `peft_…` methods give what PEFT itself gives, on a small model with its own adapters."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, LoraModel, get_peft_model
from peft.utils import merge_utils
from torch import Tensor, nn

from adapters import METHODS, LoraAdapter, fuse, load, parse
from adapters.algebra.sparsify import Draw

WEIGHTS = {"a": 0.7, "b": -0.4, "c": 0.3}
CONFIGS = {
    "a": LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v"]),
    "b": LoraConfig(r=4, lora_alpha=4, target_modules=["q", "o"], use_rslora=True),
    "c": LoraConfig(r=4, lora_alpha=6, target_modules=["v", "o"], alpha_pattern={"o": 3}),
}
SEED = 7


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.o = nn.Linear(24, 20), nn.Linear(24, 8), nn.Linear(20, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x)) + self.v(x).sum()  # type: ignore[no-any-return]  # modules return Any


@pytest.fixture(scope="module")
def peft_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoraModel, dict[str, LoraAdapter]]:
    torch.manual_seed(0)
    names = list(CONFIGS)
    model = get_peft_model(Small(), CONFIGS["a"], adapter_name="a")
    for name in names[1:]:
        model.add_adapter(name, CONFIGS[name])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    folder: Path = tmp_path_factory.mktemp("peft")
    model.save_pretrained(str(folder), save_embedding_layers=False)
    family = {name: load(folder / name) for name in names}
    return model.base_model, family


def same_masks(family: dict[str, LoraAdapter], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PEFT prune with this package's masks, whichever tensor it prunes."""
    known: list[tuple[Tensor, Draw]] = []
    for adapter in family.values():
        for module, found in adapter.modules.items():
            for tensor, part in ((found.a, ".lora_A"), (found.b, ".lora_B"), (adapter.delta(module), "")):
                known.append((tensor, Draw(SEED, adapter.digest, module + part)))

    def pruned(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        draw = next(d for t, d in known if t.shape == tensor.shape and torch.allclose(t, tensor, atol=1e-6))
        kept = tensor * (draw.uniform(tensor) < density)
        return kept / density if rescale else kept

    monkeypatch.setattr(merge_utils, "random_pruning", pruned)


def merged(model: LoraModel, kind: str, majority: str) -> dict[str, Tensor]:
    """PEFT's result: ΔW by module."""
    model.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), "mix", kind, density=0.5, majority_sign_method=majority
    )
    try:
        return {name: getattr(model.model, name).get_delta_weight("mix").detach() for name in ("q", "v", "o")}
    finally:
        model.delete_adapter("mix")


KINDS = [name.removeprefix("peft_") for name in METHODS if name.startswith("peft_")]


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_peft(
    peft_model: tuple[LoraModel, dict[str, LoraAdapter]], kind: str, majority: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, family = peft_model
    same_masks(family, monkeypatch)
    options = {option.name for option in METHODS[f"peft_{kind}"].options}
    given = {"density": "0.5", "seed": str(SEED), "majority": majority}
    text = "".join(f", {name}={value}" for name, value in given.items() if name in options)
    terms = " + ".join(f"{weight}*{name}" for name, weight in WEIGHTS.items())
    fused, _ = fuse(parse(f"peft_{kind}({terms}{text})"), family)
    for module, wanted in merged(model, kind, majority).items():
        assert (fused.delta(module) - wanted).norm() <= 1e-5 * wanted.norm()
