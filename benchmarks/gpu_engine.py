"""One engine of `benchmarks.gpu`, in a process of its own: vLLM, alone or with our seam, over a base without weights.

It reports how it started, with the outcome of the start-up proof where the seam is in, and then answers orders
(arm, requests at once, tokens of each) with tokens per second.
"""

import asyncio
import itertools
import os
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PARENT_RANK = 8
PROMPT_TOKENS = 32
VOCABULARY = 32000
WEIGHT_SCALE = 20.0
"""vLLM's dummy weights lie within 1e-3, norms too: too small for any adapter's effect to show in the answers."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "TORCHINDUCTOR_COMPILE_THREADS": "2",
    "HF_HUB_OFFLINE": "1",
}


class Offline:
    """What the start-up proof asks of an engine, over vLLM's offline class: probes made together are one batch."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.config = llm.llm_engine.vllm_config
        self.alive, self.why_no_phases = True, None
        self._ids = itertools.count(1000)
        self._waiting: list[tuple[Sequence[int], Any, asyncio.Future[list[dict[int, float]]]]] = []

    async def load(self, path: Path, name: str) -> Any:
        """As `service.engine.server.Engine.load`, without its check."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(name, next(self._ids), str(path))
        self.llm.llm_engine.add_lora(request)
        return request

    async def number_modules(self, names: Sequence[str]) -> None:
        """As `service.engine.server.Engine.number_modules`, for as many rows as any step needs."""
        self.llm.collective_rpc("fusion_number_modules", args=(list(names),))
        assert self.llm.collective_rpc("fusion_spare_rows") == [None]

    async def unload(self, request: Any) -> None:
        """As `service.engine.server.Engine.unload`."""
        self.llm.llm_engine.remove_lora(request.lora_int_id)

    async def probe(self, prompt: Sequence[int], lora: Any) -> list[dict[int, float]]:
        """As `service.engine.server.Engine.probe`."""
        answer: asyncio.Future[list[dict[int, float]]] = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt, lora, answer))
        await asyncio.sleep(0)  # the others of a `gather` queue up
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            from service.engine.probe import probe_sampling

            sampling = probe_sampling(prompt[0], 20)
            sampling.detokenize = False
            prompts = [{"prompt_token_ids": list(tokens)} for tokens, _, _ in waiting]
            loras = [lora for _, lora, _ in waiting]
            outputs = self.llm.generate(prompts, sampling, lora_request=loras, use_tqdm=False)
            for (_, _, future), output in zip(waiting, outputs, strict=True):
                future.set_result([{t: e.logprob for t, e in step.items()} for step in output.outputs[0].logprobs])
        return await answer


def run_engine(to: Connection, kind: str, rank: int, folder: Path, log: Path) -> None:
    """The process: start vLLM, prove mixing where `kind` is ours, then answer orders until one is None."""
    with log.open("w", buffering=1) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ |= {**ENVIRONMENT, "VLLM_USE_V2_MODEL_RUNNER": "0" if kind == "ours-v1" else "1"}
    os.environ["VLLM_LORA_ENABLE_DUAL_STREAM"] = "1" if kind == "ours-dual" else "0"
    try:
        began = time.monotonic()
        llm = _start(kind, rank, folder)
        to.send(_report(llm, kind, rank, folder, time.monotonic() - began))
        _answer(to, llm, random.Random(f"{kind}{rank}"), rank, folder)
    except BaseException as error:
        traceback.print_exc()
        to.send({"error": f"{kind} {rank}: {type(error).__name__}: {error}"})


def _start(kind: str, rank: int, folder: Path) -> Any:
    import torch
    import vllm

    flags: dict[str, Any] = {}
    if kind != "base":
        flags = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 8}
    if kind.startswith("ours"):
        from service.engine import supported
        from service.engine.seam import SEAM_VERSION

        supported.SUPPORTED_VLLM = (vllm.__version__,)  # here the proof decides, not the number
        flags |= {
            "worker_extension_cls": "service.engine.worker.FusionWorker",
            "additional_config": {"fusion_seam": SEAM_VERSION},
        }
    llm = vllm.LLM(
        model=str(folder / "base"),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=3 * 2**30,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]},
        **flags,
    )

    def scale_weights(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.fill_(1.0) if "norm" in name else weight.mul_(WEIGHT_SCALE)

    llm.apply_model(scale_weights)
    return llm


def _report(llm: Any, kind: str, rank: int, folder: Path, start_s: float) -> dict[str, Any]:
    import vllm

    report: dict[str, Any] = {"kind": kind, "rank": rank, "vllm": vllm.__version__, "start_s": start_s}
    report["v2"] = bool(getattr(llm.llm_engine.vllm_config, "use_v2_model_runner", False))
    if kind.startswith("ours"):
        from adapters import load
        from service.engine.proof import prove

        shapes = {name: (m.b.shape[0], m.a.shape[1]) for name, m in load(folder / "p0").modules.items()}
        engine: Any = Offline(llm)
        with tempfile.TemporaryDirectory() as scratch:
            report["proof"] = asdict(asyncio.run(prove(engine, shapes, Path(scratch))))
    print(report, flush=True)
    return report


def _answer(to: Connection, llm: Any, draw: random.Random, rank: int, folder: Path) -> None:
    import vllm

    request = _requests(draw, rank, folder)
    while (order := to.recv()) is not None:
        arm, n, tokens = order

        def ask(n: int, tokens: int, arm: str = arm) -> float:
            sampling = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            prompts = [{"prompt_token_ids": draw.choices(range(10, VOCABULARY), k=PROMPT_TOKENS)} for _ in range(n)]
            loras = None if arm == "base" else [request(arm) for _ in range(n)]
            began = time.perf_counter()
            llm.generate(prompts, sampling, lora_request=loras, use_tqdm=False)
            return time.perf_counter() - began

        ask(1, 1)  # into the slot, which holds another arm's adapter
        to.send(n * tokens / ask(n, tokens))


def _requests(draw: random.Random, rank: int, folder: Path) -> Callable[[str], Any]:
    """Makes an arm's next request: an adapter's own, or a new mix over the stack."""
    from vllm.lora.request import LoRARequest

    from service.engine.names import mix_name

    def request(arm: str) -> Any:
        if arm.startswith("mixed"):
            spans = [(PARENT_RANK, draw.uniform(-1, 1)) for _ in range(rank // PARENT_RANK)]
            return LoRARequest(mix_name("stack", spans), 3, str(folder / f"stack{rank}"))
        name = "p0" if arm == "one" else f"{arm}{rank}"
        return LoRARequest(name, 1 if arm == "one" else 2, str(folder / name))

    return request
