"""Serving fused ranks and mixes on a GPU: `python -m benchmarks.gpu [--ranks 8,16,32,64] [--requests 1,32]`.

A base of Llama-2-7B's shape with random weights, bfloat16, and random adapters of rank 8 on all its linear layers.
Every engine is a process of its own and all share the GPU, some 18 GiB each; they start together and are then asked in
turn, so that no two work at once. The peers are vLLM without our code: without LoRA at all, and with one adapter. Ours
answer with one fused adapter of rank r (a sum of r/8 adapters), and with a mix of its own for every request over the
stack of the same adapters. A figure for mixing counts only where the engine's start-up proof passed; where one fails,
the program says so and exits 1.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import PAIRS, Comparison, record

COMMAND = "python -m benchmarks.gpu"
PARENT_RANK = 8
PROMPT_TOKENS = 32
SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8},
}
VOCABULARY = 32000
WEIGHT_SCALE = 20.0
"""vLLM's dummy weights lie within 1e-3, norms too: too small for any adapter's effect to show in the answers."""


class Offline:
    """What the start-up proof asks of an engine, over vLLM's offline class: probes made together are one batch."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.config = llm.llm_engine.vllm_config
        self._ids = itertools.count(1000)
        self._waiting: list[tuple[Sequence[int], Any, asyncio.Future[list[dict[int, float]]]]] = []

    async def load(self, path: Path, name: str) -> Any:
        """Load the adapter folder."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(name, next(self._ids), str(path))
        self.llm.llm_engine.add_lora(request)
        return request

    async def unload(self, request: Any) -> None:
        """Drop it."""
        self.llm.llm_engine.remove_lora(request.lora_int_id)

    async def probe(self, prompt: Sequence[int], lora: Any) -> list[dict[int, float]]:
        """As `service.engine.server.Engine.probe`."""
        answer: asyncio.Future[list[dict[int, float]]] = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt, lora, answer))
        await asyncio.sleep(0)  # the others of a `gather` queue up
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            from service.engine.proof import probing

            sampling = probing(prompt[0], 20)
            sampling.detokenize = False
            prompts = [{"prompt_token_ids": list(tokens)} for tokens, _, _ in waiting]
            loras = [one for _, one, _ in waiting]
            for (_, _, future), output in zip(
                waiting, self.llm.generate(prompts, sampling, lora_request=loras, use_tqdm=False), strict=True
            ):
                future.set_result([{t: e.logprob for t, e in step.items()} for step in output.outputs[0].logprobs])
        return await answer


def adapters_of(folder: Path, shape: dict[str, int], ranks: Sequence[int]) -> None:
    """Write the base's configuration, one adapter of rank 8, and a fused adapter and a stack for every rank."""
    import torch
    from transformers import LlamaConfig

    from adapters import LoraModule, Recipe, Term, fuse, make_adapter, save, stack

    config = LlamaConfig(
        **shape, vocab_size=VOCABULARY, max_position_embeddings=2048, architectures=["LlamaForCausalLM"]
    )
    config.save_pretrained(folder / "base")
    d, inner = shape["hidden_size"], shape["intermediate_size"]
    layers = {f"self_attn.{name}_proj": (d, d) for name in "qkvo"}
    layers |= {"mlp.gate_proj": (inner, d), "mlp.up_proj": (inner, d), "mlp.down_proj": (d, inner)}
    draw = torch.Generator().manual_seed(0)
    parents = {}
    for i in range(max(ranks) // PARENT_RANK):
        modules = {}
        for layer, (name, (rows, columns)) in itertools.product(range(shape["num_hidden_layers"]), layers.items()):
            a = torch.randn(PARENT_RANK, columns, generator=draw) / columns**0.5
            b = torch.randn(rows, PARENT_RANK, generator=draw) * 0.1
            modules[f"model.layers.{layer}.{name}"] = LoraModule(a.bfloat16(), b.bfloat16(), 1.0)
        parents[f"p{i}"] = make_adapter(modules, None)
    save(parents["p0"], folder / "one")
    for rank in ranks:
        used = dict(itertools.islice(parents.items(), rank // PARENT_RANK))
        fused, _ = fuse(Recipe("sum", tuple(Term(name, 1 / len(used)) for name in used)), used)
        save(fused, folder / f"fused{rank}")
        save(stack(used).adapter, folder / f"stack{rank}")


def engine(to: Connection, kind: str, rank: int, folder: Path, log: Path) -> None:
    """A process: start vLLM, prove mixing where `kind` is ours, then answer (arm, requests, tokens) with tokens/s."""
    with log.open("w", buffering=1) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0" if kind == "ours-v1" else "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
        "HF_HUB_OFFLINE": "1",
    }
    try:
        _serve(to, kind, rank, folder)
    except BaseException as error:
        traceback.print_exc()
        to.send({"error": f"{kind} {rank}: {type(error).__name__}: {error}"})


def _serve(to: Connection, kind: str, rank: int, folder: Path) -> None:
    import torch
    import vllm
    from vllm.lora.request import LoRARequest

    flags: dict[str, Any] = {}
    if kind != "base":
        flags = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 8}
    if kind.startswith("ours"):
        from service.engine import seam
        from service.engine.names import mix_name
        from service.engine.proof import prove

        seam.SUPPORTED_VLLM = (vllm.__version__,)  # here the proof below decides, not the number
        flags |= {
            "worker_extension_cls": "service.engine.worker.FusionWorker",
            "additional_config": {"fusion_seam": seam.SEAM_VERSION},
        }
    began = time.monotonic()
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

    def usable(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.fill_(1.0) if "norm" in name else weight.mul_(WEIGHT_SCALE)

    llm.apply_model(usable)
    report: dict[str, Any] = {"kind": kind, "rank": rank, "vllm": vllm.__version__, "start_s": time.monotonic() - began}
    report["v2"] = bool(getattr(llm.llm_engine.vllm_config, "use_v2_model_runner", False))
    if kind.startswith("ours"):
        from adapters import load

        shapes = {name: (m.b.shape[0], m.a.shape[1]) for name, m in load(folder / "one").modules.items()}
        asked: Any = Offline(llm)
        with tempfile.TemporaryDirectory() as scratch:
            report["proof"] = asdict(asyncio.run(prove(asked, shapes, Path(scratch))))
    print(report, flush=True)
    to.send(report)
    draw = random.Random(f"{kind}{rank}")
    ids = {"one": 1, "fused": 2, "stack": 3}

    def loras(arm: str, n: int) -> list[Any] | None:
        if arm == "base":
            return None
        if arm != "mixed":
            name = arm if arm == "one" else f"{arm}{rank}"
            return [LoRARequest(name, ids[arm], str(folder / name))] * n
        path = str(folder / f"stack{rank}")
        spans = [[(PARENT_RANK, draw.uniform(-1, 1)) for _ in range(rank // PARENT_RANK)] for _ in range(n)]
        return [LoRARequest(mix_name("stack", one), ids["stack"], path) for one in spans]

    while (order := to.recv()) is not None:
        arm, n, tokens = order
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        brief = vllm.SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)

        def ask(n: int, how: Any, arm: str = arm) -> float:
            prompts = [{"prompt_token_ids": draw.choices(range(10, VOCABULARY), k=PROMPT_TOKENS)} for _ in range(n)]
            own = loras(arm, n)
            began = time.perf_counter()
            llm.generate(prompts, how, lora_request=own, use_tqdm=False)
            return time.perf_counter() - began

        ask(1, brief)  # into the slot, which holds another arm's adapter
        to.send(n * tokens / ask(n, sampling))


def compare(rates: dict[tuple[str, int], list[float]], n: int, ranks: Sequence[int]) -> list[Comparison]:
    """The rows for `n` requests at once."""
    rows = []
    at = f"{n} request{'s' if n > 1 else ''}"

    def row(name: str, ours_is: str, ours: tuple[str, int], peer_is: str, peer: tuple[str, int], aim: float) -> None:
        pairs = tuple(rates[ours]), tuple(rates[peer])
        rows.append(Comparison(f"GPU, {at}: {name}", ours_is, peer_is, "tok/s", (">=", aim), *pairs))

    for r in ranks:
        fused = ("fused", r)
        row(f"fused rank {r} against the base", "one fused adapter", fused, "vLLM without LoRA", ("base", 0), 0.7)
        row(
            f"fused rank {r} against one rank 8 adapter",
            "one fused adapter",
            fused,
            "vLLM, one adapter",
            ("one", 8),
            0.9,
        )
        mixed = f"{n} different mixes over a stack of rank {r}" if n > 1 else f"a mix over a stack of rank {r}"
        row(f"{mixed} against one fused adapter", "mixed", ("mixed", r), "built, the same engine", fused, 0.95)
        if ("one", r) in rates and r != PARENT_RANK:
            row(f"{mixed} against vLLM with one adapter", "mixed", ("mixed", r), "vLLM, one adapter", ("one", r), 0.95)
    return rows


def main() -> int:
    """Command line; exit 0 measured, 1 an engine failed or a proof did not pass."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ranks", default="8,16,32,64", help="of the fused adapters; default: %(default)s")
    parser.add_argument("--stock", default="8,16", help="ranks of stock vLLM's engines; default: %(default)s")
    parser.add_argument("--requests", default="1,32", help="at once; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=96, help="of every answer; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=PAIRS, help="default: %(default)s")
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="of the base; default: %(default)s")
    parser.add_argument("--logs", type=Path, default=Path("."), help="folder for the engines' logs; default: here")
    args = parser.parse_args()
    ranks, stock = ([int(r) for r in text.split(",")] for text in (args.ranks, args.stock))
    folder = Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    adapters_of(folder, SHAPES[args.shape], ranks)
    print(f"adapters written; {len(ranks) + len(stock) + 2} engines start", flush=True)
    wanted = [("base", 0), *(("stock", r) for r in stock), *(("ours", r) for r in ranks), ("ours-v1", ranks[0])]
    context = multiprocessing.get_context("spawn")
    engines: dict[tuple[str, int], tuple[Any, Connection]] = {}
    for kind, rank in wanted:
        here, there = context.Pipe()
        log = args.logs / f"engine-{kind}-{rank}.log"
        process = context.Process(target=engine, args=(there, kind, rank, folder, log))
        process.start()
        there.close()
        engines[kind, rank] = (process, here)
    sound = True
    try:
        for key, (_, pipe) in list(engines.items()):
            try:
                report = pipe.recv()
            except EOFError:
                report = {"error": f"{key}: the process ended, see its log"}
            print(json.dumps(report), flush=True)
            if "error" in report or not report.get("proof", {"proven": True})["proven"]:
                sound = False
                engines.pop(key)[1].close()
        arms = [(kind, rank, arm) for kind, rank, arm in _arms(ranks, stock) if (kind, rank) in engines]
        rows = []
        for n in (int(one) for one in args.requests.split(",")):
            rates: dict[tuple[str, int], list[float]] = {}
            for i in range(args.rounds + 1):  # the first is not counted: it compiles kernels
                for kind, rank, arm in arms if i % 2 == 0 else arms[::-1]:
                    pipe = engines[kind, rank][1]
                    pipe.send((arm, n, args.tokens))
                    rate = pipe.recv()
                    if i:
                        rates.setdefault((arm, rank), []).append(rate)
            print(n, {f"{arm} {rank}": round(median(taken), 1) for (arm, rank), taken in rates.items()}, flush=True)
            complete = [r for r in ranks if ("fused", r) in rates and ("base", 0) in rates and ("one", 8) in rates]
            rows += compare(rates, n, complete)
        if rows:
            record("gpu.json", COMMAND, rows)
    finally:
        for process, pipe in engines.values():
            try:
                pipe.send(None)
            except OSError:
                process.kill()
            process.join(20)
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if sound else 1


def _arms(ranks: Sequence[int], stock: Sequence[int]) -> list[tuple[str, int, str]]:
    ours = [("ours", r, arm) for r in ranks for arm in ("fused", "mixed")]
    return [("base", 0, "base"), *(("stock", r, "one") for r in stock), *ours]


if __name__ == "__main__":
    sys.exit(main())
