"""vLLM's own distribution inside one service: two ranks each of tensor, pipeline and data parallelism, on CPUs.

`make soak` runs it and writes benchmarks/results/ranks.json; docs/distribution.md says what it shows.
"""

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import vllm

from service.engine.ranks import Ranks
from tests.conftest import ROOT, Server, launch, stop, wait_ready
from tests.service.functions import NAME, Tiny, draw_ids
from tests.service.test_exact import ask

RESULT = ROOT / "benchmarks/results/ranks.json"
TOLERANCE = 1e-4
MIN_EFFECT = 100 * TOLERANCE
KINDS = {
    "tensor": ("--tensor-parallel-size 2", 1),
    "pipeline": ("--pipeline-parallel-size 2", 1),
    "data": ("--data-parallel-size 2", 2),
}
"""vLLM's flags, and how many engines they make."""


def list_work(tiny: Tiny) -> list[tuple[str, Any]]:
    """What is asked as which model, and the weights by position and module that it means."""
    table = [[0.2 if ".mlp." in name else 0.6, 0.0] for name in tiny.modules]
    return [
        (NAME, None),
        ("x", [(-1, [1.0, 0.0])]),
        ("0.7*x + 0.5*y", [(-1, [0.7, 0.5])]),
        ("-0.4*x + 1.5*y", [(-1, [-0.4, 1.5])]),
        ("{*.mlp.*: 0.2, *: 0.6}*x", [(-1, table)]),
        ("answer(x)", [(-1, [0.0, 0.0]), (0, [1.0, 0.0])]),
    ]


def measure(tiny: Tiny, server: Server) -> dict[str, float]:
    """Ask everything twice at once: the largest difference from the reference, the smallest effect of weights."""
    work = list_work(tiny) * 2
    prompts = [draw_ids(i, 24 + 5 * i) for i in range(len(work))]
    with ThreadPoolExecutor(len(work)) as pool:
        answers = list(pool.map(lambda item, ids: ask(server, item[0], ids), work, prompts))
    error, effect = 0.0, float("inf")
    for (_, phases), prompt, (ids, values) in zip(work, prompts, answers, strict=True):
        expected = tiny.log_probabilities(ids, len(prompt), phases)
        error = max(error, *(abs(a - b) for a, b in zip(expected, values, strict=True)))
        if phases is not None:
            base = tiny.log_probabilities(ids, len(prompt), None)
            effect = min(effect, max(abs(a - b) for a, b in zip(expected, base, strict=True)))
    return {"error": error, "effect": effect}


def count_tokens(url: str) -> list[float]:
    """Tokens of prompts that each engine has computed, by vLLM's series."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    return [float(n) for n in re.findall(r"^vllm:prompt_tokens_total\{[^}]*engine=[^}]*\} (\S+)$", text, re.M)]


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_answer_as_one(kind: str, tmp_path: Path) -> None:
    flags, engines = KINDS[kind]
    tiny = Tiny(tmp_path)
    adapters = {name: tmp_path / "adapters" / name for name in tiny.adapters}
    process, url = launch(
        tmp_path / "data",
        tmp_path,
        tmp_path / "server.log",
        FUSION_BASE=str(tiny.base),
        FUSION_BASE_NAME=NAME,
        FUSION_ADAPTERS=",".join(f"{name}={path}" for name, path in adapters.items()),
        FUSION_MIXED="required",
        FUSION_ENGINE_ARGS=f"--dtype float32 --max-model-len 256 --max-num-seqs 8 {flags}",
        VLLM_CPU_KVCACHE_SPACE="1",
    )
    try:
        wait_ready(process, url, tmp_path / "server.log")
        mixing = httpx.get(f"{url}/readyz", timeout=60).json()["mixing"]
        before = count_tokens(url)
        found = measure(tiny, Server(url, adapters, tmp_path / "data", process, tmp_path / "server.log"))
        asked = [after - first for first, after in zip(before, count_tokens(url), strict=True)]
    finally:
        stop(process)
    print(kind, mixing, found, asked, flush=True)
    assert (mixing["proven"], mixing["tables"], mixing["phases"]) == (True, True, True)
    assert (mixing["engines"], mixing["ranks"]) == (engines, 2)
    assert found["error"] < TOLERANCE
    assert found["effect"] > MIN_EFFECT
    assert len(asked) == engines
    assert min(asked) > 0, "every engine has answered"
    content: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    row = {"flags": flags, "engines": engines, "ranks": 2, "largest_difference": found["error"]}
    row |= {"effect": found["effect"], "device": "CPU, float32", "vllm": vllm.__version__}
    content[kind] = row | {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": "pytest -m soak tests/service/test_ranks.py",
    }
    RESULT.write_text(json.dumps(content, indent=1) + "\n")


def make_ranks(*answers: Any) -> Ranks:
    """Of a client whose engines answer so; exceptions are raised."""

    async def call(utility: str, method: str, timeout: None, args: tuple[Any, ...], kwargs: None) -> list[Any]:
        assert (utility, method, args) == ("collective_rpc", "method", (7,))
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return list(answers)

    core = SimpleNamespace(core_engines=list(range(len(answers))), call_utility_all_async=call)
    return Ranks(SimpleNamespace(engine_core=core))


def test_calls_give_what_the_workers_of_every_engine_say() -> None:
    ranks = make_ranks([{"a": 1}, {}], [{}, {"b": 2}])
    assert ranks.engines == 2
    assert asyncio.run(ranks.call("method", 7)) == [[{"a": 1}, {}], [{}, {"b": 2}]]


def test_the_failure_of_any_engine_is_seen() -> None:
    with pytest.raises(RuntimeError, match="no room"):
        asyncio.run(make_ranks([{}], RuntimeError("no room")).call("method", 7))
