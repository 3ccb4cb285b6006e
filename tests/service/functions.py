"""Weights as functions in plain code: transformers with hooks, one row of weights per module and position."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from adapters import load, save, stack
from tests.conftest import ROOT
from tests.service.families import FAMILIES, VOCABULARY, make_adapters, make_base

FLAGS = "--dtype float32 --max-model-len 384 --max-num-batched-tokens 64 --max-num-seqs 16 --block-size 32".split()  # noqa: SIM905 - flags
NAME = "tiny"
WIDTHS = [4, 2]
"""Ranks of the adapters x and y, which is their order in the stack."""
Phases = Sequence[tuple[int, Any]]


def draw_ids(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCABULARY), k=count)


class Tiny:
    """A tiny random base with two random adapters, their stack for the engine, and what both must compute."""

    def __init__(self, folder: Path, family: str = "Qwen2") -> None:
        self.folder = folder
        self.base = make_base(FAMILIES[family], folder / "base")
        paths = make_adapters(self.base, NAME, FAMILIES[family], folder / "adapters")
        self.adapters = {name: load(path) for name, path in paths.items()}
        both = stack(self.adapters).adapter
        save(both, folder / "stack")
        self.shapes = {name: [m.b.shape[0], m.a.shape[1]] for name, m in both.modules.items()}
        self.modules = list(self.shapes)
        self.model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32, attn_implementation="eager")
        self._weights: dict[str, torch.Tensor] = {}
        for name, module in self.model.named_modules():
            if name in self.shapes:
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        factors = [adapter.modules.get(name) for adapter in self.adapters.values()]

        def add(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            weights = self._weights.get(name)
            for factor, first in zip(factors, (0, WIDTHS[0]), strict=True):
                if factor is not None and weights is not None:
                    rows = weights[:, first : first + factor.rank]
                    output = output + factor.scaling * ((inputs[0] @ factor.a.T) * rows) @ factor.b.T
            return output

        return add

    def log_probabilities(self, ids: Sequence[int], prompt: int, phases: Phases | None) -> list[float]:
        """Of every token after the first, when the first `prompt` of them were the prompt."""
        logits = self._logits(ids, prompt, phases)
        return [float(logits[i, token]) for i, token in enumerate(ids[1:])]

    def next_token(self, ids: Sequence[int], prompt: int, phases: Phases | None) -> int:
        """The likeliest."""
        return int(self._logits(ids, prompt, phases)[-1].argmax())

    def _logits(self, ids: Sequence[int], prompt: int, phases: Phases | None) -> torch.Tensor:
        self._weights = {}
        for row, name in enumerate(self.modules if phases is not None else []):
            weights = torch.zeros(len(ids), sum(WIDTHS))
            for start, values in phases or ():
                table = torch.tensor(values, dtype=torch.float32).reshape(-1, np.shape(values)[-1])
                own = table[row if len(table) > 1 else 0]
                whole = own if len(own) == sum(WIDTHS) else torch.cat([own[:1].repeat(4), own[1:].repeat(2)])
                # Token number `prompt + start` is what the position before it computes.
                weights[0 if start < 0 else prompt + start - 1 :] = whole
            self._weights[name] = weights
        with torch.inference_mode():
            logits: torch.Tensor = self.model(torch.tensor([list(ids)])).logits[0].log_softmax(-1)
        return logits

    def serve(self, rounds: list[list[dict[str, Any]]], *flags: str, site: str = "") -> dict[str, Any]:
        """What `function_engine` answers; `site` becomes `sitecustomize` in all of its processes."""
        (self.folder / "site").mkdir(exist_ok=True)
        (self.folder / "site/sitecustomize.py").write_text(site)
        work = {"base": str(self.base), "stack": str(self.folder / "stack"), "shapes": self.shapes, "rounds": rounds}
        (self.folder / "work.json").write_text(json.dumps(work | {"flags": [*FLAGS, *flags]}))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.folder / "site"), str(ROOT)]),
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        command = [sys.executable, "-m", "tests.service.function_engine", "work.json", "out.json"]
        with (self.folder / "log").open("w") as log:
            code = subprocess.run(command, cwd=self.folder, env=environment, stdout=log, stderr=log, check=False)
        assert code.returncode == 0, (self.folder / "log").read_text()[-3000:]
        out: dict[str, Any] = json.loads((self.folder / "out.json").read_text())
        return out

    def error(self, request: dict[str, Any], result: dict[str, Any]) -> float:
        """Largest difference of a request's log-probabilities from the reference."""
        worst, prompt = 0.0, len(request["ids"])
        for answer, values in zip(result["answers"], result["logprobs"], strict=True):
            expected = self.log_probabilities(request["ids"] + answer, prompt, request.get("phases"))
            served = [*(result["prompt"] or expected[: prompt - 1]), *values]
            assert len(served) == len(expected) == prompt + request["tokens"] - 1
            worst = max(worst, *(abs(a - b) for a, b in zip(served, expected, strict=True)))
        return worst
