"""A program: start an engine on a tiny base, prove it, and answer rounds of requests whose weights are functions.

    python -m tests.service.function_engine WORK OUT

WORK is JSON with `base`, `stack` (a folder), `shapes`, `flags` and `rounds`, lists of requests that come at once; the
fields of a request are those of `ask`. OUT gets `proof`, `preemptions` and what each request was answered with.
"""

import asyncio
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams

from service.engine.flags import EngineOptions
from service.engine.models import mix_request
from service.engine.proof import prove
from service.engine.server import Engine, start_engine
from service.engine.weights import Phase, Weights


def chosen(ids: Any, logprobs: Any) -> list[float]:
    """The log-probabilities of these tokens."""
    return [step[token].logprob for token, step in zip(ids, logprobs, strict=True)]


async def ask(
    engine: Engine,
    stack: LoRARequest,
    number: str,
    *,
    ids: list[int],
    tokens: int,
    widths: list[int] | None = None,
    phases: list[Any] | None = None,
    echo: bool = False,
    n: int = 1,
    delay_s: float = 0,
) -> dict[str, Any]:
    """Answer the prompt `ids` with `tokens` tokens; without `widths` by the base, without `phases` by a plain mix."""
    lora = None
    if widths is not None and phases is not None:
        weights = Weights(tuple(widths), tuple(Phase(start, values) for start, values in phases))
        lora = mix_request(stack, "f" * 64, weights)
    sampling = SamplingParams(
        n=n,
        temperature=0 if n == 1 else 1,
        max_tokens=tokens,
        logprobs=0,
        prompt_logprobs=0 if echo else None,
        ignore_eos=True,
    )
    await asyncio.sleep(delay_s)
    final: Any = None
    async for output in engine.client.generate(
        TokensPrompt(prompt_token_ids=ids), sampling, request_id=number, lora_request=lora
    ):
        final = output
    return {
        "prompt": chosen(ids[1:], final.prompt_logprobs[1:]) if echo else [],
        "answers": [list(answer.token_ids) for answer in final.outputs],
        "logprobs": [chosen(answer.token_ids, answer.logprobs) for answer in final.outputs],
        "cached": final.num_cached_tokens,
    }


async def run(work: dict[str, Any]) -> dict[str, Any]:
    """What OUT gets."""
    engine = await start_engine(EngineOptions(work["base"], "tiny", 8, 2, 4, mixing=True, extra=tuple(work["flags"])))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            proof = await prove(engine, work["shapes"], Path(scratch))
        stack = await engine.load(Path(work["stack"]), "~stack/tiny")
        results = []
        for i, requests in enumerate(work["rounds"]):
            asked = (ask(engine, stack, f"{i}-{j}", **request) for j, request in enumerate(requests))
            results.append(await asyncio.gather(*asked))
        samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
        preemptions = sum(sample.value for sample in samples if sample.name == "vllm:num_preemptions_total")
        return {"proof": asdict(proof), "modules": engine.modules, "preemptions": preemptions, "rounds": results}
    finally:
        await engine.close()


if __name__ == "__main__":
    out = asyncio.run(run(json.loads(Path(sys.argv[1]).read_text())))
    Path(sys.argv[2]).write_text(json.dumps(out))
