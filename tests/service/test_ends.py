"""Engines that cannot serve: they end the server with the reason, and leave nothing."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BASE, stop
from tests.service.own import Own

# A fault of the engine at its first request, which is that of the proof.
BROKEN_STEP = """
import sys, importlib.abc
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "service.engine.worker":
            import service.engine.seam as seam
            def fail(*args): raise ArithmeticError("the step is broken")
            seam.step_rows = fail
        return None
sys.meta_path.insert(0, Finder())
"""
PATIENT: dict[str, Any] = {"FUSION_LOOP_TIMEOUT_S": "30", "FUSION_STOP_TIMEOUT_S": "30"}


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="own"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def make_experts(folder: Path) -> Path:
    """A tiny random mixture-of-experts base."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder / "experts")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder / "experts")
    return folder / "experts"


@pytest.mark.parametrize("fault", ["experts", "broken step"])
def test_an_engine_that_cannot_serve_ends_the_server_with_the_reason(fault: str, folder: Path) -> None:
    if fault == "experts":
        own = Own(folder, FUSION_BASE=str(make_experts(folder)), **PATIENT)
    else:
        own = Own(folder, site=BROKEN_STEP, **PATIENT)
    try:
        reason = own.error()
        if fault == "experts":
            assert "has experts" in reason
            assert "serve it on a GPU" in reason
        else:
            assert "the engine died while it started: ArithmeticError: the step is broken" in reason
        own.assert_gone()
        assert not list(own.scratch.iterdir())
    finally:
        stop(own.process)
