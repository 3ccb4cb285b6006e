"""A server on a base of its own, and how far its log-probabilities lie from transformers + PEFT."""

import os
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.conftest import ROOT, Server, launch, stop, wait_ready
from tests.service.families import VOCABULARY
from tests.service.reference import PeftReference
from tests.service.test_exact import ask

NAME = "tiny"
"""What the base is served as."""
WORK: tuple[tuple[str, str, str | None], ...] = (
    ("base", NAME, None),
    ("mixed", "x", "x"),
    ("mixed", "0.7*x + 0.5*y", "0.7*x + 0.5*y"),
    ("mixed", "-0.4*x + 0*y", "-0.4*x"),
    ("mixed", "1.5*y", "1.5*y"),
    ("built", "svd(0.7*x + 0.5*y, rank=6)", "0.7*x + 0.5*y"),
)
"""What is compared: how it is served, as which model, and the plain sum that it equals. Rank 6 holds all of it."""


TORCHVISION = """
import importlib.abc
import importlib.machinery
import sys
import types


class Name(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class Anything(metaclass=Name):
    pass


class Module(types.ModuleType):
    __path__ = []
    __version__ = "0.28.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(Finder())
"""
"""A `sitecustomize` in which torchvision can be imported where it is missing: models that see import it, and call it
for images alone.
"""


def compare(
    base: Path, adapters: Mapping[str, Path], reference: PeftReference, folder: Path, engine: str, site: str = ""
) -> dict[str, float]:
    """Serve `base` and ask everything in one batch: the largest difference of a log-probability from the reference's,
    of "base", "mixed" and "built"; and "effect", the smallest of the largest differences that an adapter makes. `site`
    becomes `sitecustomize`, which every process of the server runs first.
    """
    (folder / "sitecustomize.py").write_text(site)
    process, url = launch(
        folder / "data",
        folder,
        folder / "log",
        FUSION_BASE=str(base),
        FUSION_BASE_NAME=NAME,
        FUSION_ADAPTERS=",".join(f"{name}={path}" for name, path in adapters.items()),
        FUSION_MIXED="required",
        FUSION_ENGINE_ARGS=f"--max-model-len 256 --max-num-seqs 8 {engine}",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CACHE_ROOT=str(folder / "vllm"),  # vLLM remembers what it could import
        PYTHONPATH=os.pathsep.join([str(folder), str(ROOT)]),
    )
    try:
        wait_ready(process, url, folder / "log")
        server = Server(url, dict(adapters), folder / "data", process, folder / "log")
        draw = random.Random(3)
        prompts = [[draw.randrange(4, VOCABULARY) for _ in range(24 + 5 * i)] for i in range(len(WORK))]
        with ThreadPoolExecutor(len(WORK)) as pool:
            answers = list(pool.map(lambda work, ids: ask(server, work[1], ids), WORK, prompts))
    finally:
        stop(process)
    result = {"base": 0.0, "mixed": 0.0, "built": 0.0, "effect": float("inf")}
    for (how, _, recipe), (ids, values) in zip(WORK, answers, strict=True):
        expected = reference.log_probabilities(ids, recipe)
        result[how] = max(result[how], largest_difference(expected, values))
        if recipe is not None:
            result["effect"] = min(
                result["effect"], largest_difference(expected, reference.log_probabilities(ids, None))
            )
    return result


def largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
