"""Engines that die: a killed one is replaced under the same server, one that cannot serve ends it with the reason."""

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import BASE, stop
from tests.service.own import MARGIN_S, Own, wait

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
PATIENT = {"FUSION_LOOP_TIMEOUT_S": "30", "FUSION_STOP_TIMEOUT_S": "30"}
SERIES = 'fusion_stack_requests{kind="stack"} 1.0'


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="own"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def complete(own: Own, answers: list[Any], tokens: int) -> None:
    body = {"model": "0.5*task", "prompt": "a", "max_tokens": tokens, "ignore_eos": True}
    try:
        answers.append(httpx.post(f"{own.url}/v1/completions", json=body, timeout=120).status_code)
    except httpx.HTTPError as error:
        answers.append(error)


def assert_refused_at_once(own: Own) -> None:
    for path in ("/v1/models", "/version"):
        began = time.monotonic()
        refused = own.get(path)
        assert time.monotonic() - began < 5
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "ServiceUnavailableError")
        assert int(refused.headers["retry-after"]) > 0
    assert own.status("/livez") == 200
    assert own.readiness()["state"] == "restarting"


def test_a_killed_engine_is_replaced_in_the_same_worker(folder: Path) -> None:
    own = Own(folder, FUSION_ADAPTERS="task=shipped:task", **PATIENT)
    try:
        wait(lambda: own.readiness().get("state") == "starting", 100)
        own.wait_ready()
        worker, core, answers = own.worker, own.core, list[Any]()
        running = threading.Thread(target=complete, args=(own, answers, 1500))
        running.start()
        wait(lambda: SERIES in own.get("/metrics").text, MARGIN_S)
        os.kill(core, signal.SIGKILL)
        wait(lambda: own.status("/readyz") == 503, 5)
        assert_refused_at_once(own)
        running.join(MARGIN_S)
        assert not running.is_alive()
        assert answers != [200]
        wait(lambda: "attempt 2 of 3" in own.readiness().get("reason", ""), MARGIN_S)
        own.wait_ready()
        assert own.worker == worker
        assert own.core != core
        assert SERIES not in own.get("/metrics").text, "the lease is given back"
        complete(own, answers, 2)
        assert answers[1:] == [200]
    finally:
        stop(own.process)
    own.assert_gone()
    assert own.process.returncode == 0
    assert not list(own.scratch.iterdir())


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
