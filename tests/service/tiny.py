"""Bases for the long proofs, with adapters and a gate: a tiny one that starts and answers fast, and the shipped one."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.files import CONFIG
from tests.conftest import BASE, BASE_NAME, launch
from tests.service.families import FAMILIES, SPLIT, VOCABULARY, make_base
from tests.service.reference import PeftReference

NAME = "tiny"
ADAPTERS: Mapping[str, tuple[int, Sequence[str]]] = {
    "a": (4, SPLIT),
    "b": (2, SPLIT[::2]),
    "c": (3, SPLIT[2:]),
    "d": (6, SPLIT[:5]),
    "e": (4, SPLIT),
}
"""Rank and modules of each; any two have modules in common."""
GATE = "risk"
GATE_MODULES = ("q_proj", "v_proj")
"""Of all modules of the shipped base, a gate of rank 1 already has more bytes than one may have."""
TEMPLATE = "{% for turn in messages %}{{ turn['content'] }} {% endfor %}"
ENGINE = "--dtype float32 --max-model-len 256 --max-num-seqs 32"


@dataclass(frozen=True)
class Kit:
    """A base under its name, and the folders of its adapters."""

    name: str
    base: Path
    adapters: dict[str, Path]
    store_bytes: int
    """What holds some ten stacks and builds."""

    @property
    def settings(self) -> dict[str, str]:
        """What a server needs to serve it."""
        return {
            "FUSION_BASE": str(self.base),
            "FUSION_BASE_NAME": self.name,
            "FUSION_ADAPTER_ROOTS": str(self.adapters["a"].parent),
            "FUSION_ADAPTERS": ",".join(f"{name}={path}" for name, path in self.adapters.items()),
            "FUSION_MIXED": "required",
            "FUSION_ENGINE_ARGS": ENGINE,
            "FUSION_STORE_BYTES": str(self.store_bytes),
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }

    def serve(self, data: Path, log: Path, **settings: str) -> tuple[subprocess.Popen[bytes], str]:
        """Start a server with all of this on `data`; its process and address."""
        more: dict[str, Any] = self.settings | settings
        return launch(data, self.adapters["a"].parent, log, **more)

    def make_reference(self) -> PeftReference:
        """transformers + PEFT with all adapters but the gate."""
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.base, dtype="float32").eval()
        return PeftReference(model, {name: self.adapters[name] for name in ADAPTERS})


def make_tiny(folder: Path) -> Kit:
    """A random base of two layers."""
    base = make_base(FAMILIES["Llama"], folder / "base")
    (base / "chat_template.jinja").write_text(TEMPLATE)
    return Kit(NAME, base, make_adapters(base, NAME, folder / "adapters", strength=0.2), store_bytes=2 * 2**20)


def make_shipped(folder: Path) -> Kit:
    """The base that the project serves by default."""
    return Kit(BASE_NAME, BASE, make_adapters(BASE, BASE_NAME, folder / "adapters", strength=0.02), 80 * 2**20)


def make_adapters(base: Path, name: str, folder: Path, *, strength: float) -> dict[str, Path]:
    """Random PEFT adapters of `base`, with entries of B as large as `strength`, and a gate; their folders by name."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for seed, (adapter, (rank, modules)) in enumerate({**ADAPTERS, GATE: (1, GATE_MODULES)}.items()):
        torch.manual_seed(100 + seed)
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules)))
        for parameter, value in model.named_parameters():
            if "lora_B" in parameter:
                torch.nn.init.normal_(value, std=strength)
        model.peft_config["default"].base_model_name_or_path = name
        model.save_pretrained(folder / adapter, save_embedding_layers=False)  # else it asks the hub for the base
    config = json.loads((folder / GATE / CONFIG).read_text())
    gate = {"yes": 40, "no": 50, "scale": 1.0, "offset": 0.0}
    (folder / GATE / CONFIG).write_text(json.dumps({**config, "gate": gate}))
    return {adapter: folder / adapter for adapter in (*ADAPTERS, GATE)}


def draw_prompt(draw: Any) -> list[int]:
    """Token ids of a prompt."""
    return [draw.randrange(4, VOCABULARY) for _ in range(draw.randrange(6, 40))]
