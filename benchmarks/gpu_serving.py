"""The service on a GPU against stock vLLM, over HTTP: `python -m benchmarks.gpu_serving [--shape 7b]`.

A base of Llama-2-7B's shape with random weights and the default base's tokenizer, bfloat16, and two random adapters of
rank 8 on all its linear layers. Both servers run at once on one card, with the same flags, and are asked in turn; a
third, stock vLLM without LoRA, shows what an adapter costs. Figures count only where `/readyz` says that mixing was
proven; where it was not, the program says so and exits 1.
"""

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import httpx
import torch

from benchmarks.common import BASE, PAIRS, Comparison, alternate, record
from benchmarks.gpu import SHAPES, write_models
from benchmarks.servers import RunningServer, ours, stock
from benchmarks.traffic import prompt

COMMAND = "python -m benchmarks.gpu_serving"
RANK = 16
TOKENS = 96
MIXES = "mixes"
SHARD_TENSORS = 72
KV_BYTES = 6 * 2**30
_draw = random.Random(0)


def write_weights(base: Path) -> None:
    """Random weights for the configuration in `base`, in bfloat16, and the default base's tokenizer."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    for file in BASE.glob("*token*"):
        shutil.copy(file, base / file.name)
    config = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).state_dict().items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(0)
    names, places = sorted(shapes), dict[str, str]()
    for number, start in enumerate(range(0, len(names), SHARD_TENSORS)):
        shard = {}
        for name in names[start : start + SHARD_TENSORS]:
            shape = shapes[name]
            scale = 1.0 if "embed" in name else shape[-1] ** -0.5
            random_weight = torch.randn(shape, generator=draw, device=device) * scale
            shard[name] = (torch.ones(shape) if "norm" in name else random_weight).bfloat16().cpu()
        place = f"model-{number:02}.safetensors"
        save_file(shard, base / place, {"format": "pt"})
        places |= dict.fromkeys(shard, place)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


async def _ask(client: httpx.AsyncClient, model: str, tokens: int) -> float:
    """Seconds to the first token of one streamed answer, which is read to its end, unparsed."""
    body = {"model": model, "prompt": prompt(), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    began, first = time.perf_counter(), 0.0
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{model}: {answer.status_code} {(await answer.aread()).decode()}")
        async for _ in answer.aiter_raw():
            first = first or time.perf_counter() - began
    return first


def ask_all(server: RunningServer, models: Sequence[str], tokens: int = TOKENS) -> tuple[float, float]:
    """Tokens per second, and the median of seconds to the first token, of all `models` streamed at once."""

    async def gather() -> tuple[float, list[float]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
            began = time.perf_counter()
            firsts = await asyncio.gather(*(_ask(client, model, tokens) for model in models))
            return time.perf_counter() - began, firsts

    seconds, firsts = asyncio.run(gather())
    return tokens * len(models) / seconds, median(firsts)


def models(name: str, n: int) -> list[str]:
    """`n` times `name`; for `MIXES` as many sums of the two adapters with weights never used before."""
    if name != MIXES:
        return [name] * n
    return [f"{_draw.uniform(0.3, 1):.6f}*p0 + {_draw.uniform(0.1, 0.9):.6f}*p1" for _ in range(n)]


def measure(mine: RunningServer, peer: RunningServer, bare: RunningServer, pairs: int) -> list[Comparison]:
    """All rows: throughput and first tokens of 1 and 32 streams."""
    rows = []
    one = f"stock vLLM, one adapter of rank {RANK}"

    def throughput(server: RunningServer, name: str, n: int) -> Callable[[], float]:
        return lambda: ask_all(server, models(name, n))[0]

    def first_token(server: RunningServer, name: str, n: int) -> Callable[[], float]:
        return lambda: median(ask_all(server, models(name, n), 2)[1] for _ in range(5))

    for n in (1, 32):
        at, mixed = f"GPU, HTTP, {n} stream{'s' * (n > 1)}", throughput(mine, MIXES, n)
        peers = (
            ("base", 0.97, throughput(mine, "base", n), "stock vLLM, LoRA on", throughput(peer, "base", n)),
            ("mixes against one adapter", 0.97, mixed, one, throughput(peer, "one", n)),
            ("mixes against the base", 0.85, mixed, "stock vLLM without LoRA", throughput(bare, "base", n)),
        )
        for name, aim, ours_, peer_is, theirs in peers:
            values = alternate(ours_, theirs, pairs)
            rows.append(Comparison(f"{at}: {name}", "service", peer_is, "tok/s", (">=", aim), **values))
        values = alternate(first_token(mine, MIXES, n), first_token(peer, "one", n), pairs)
        rows.append(Comparison(f"{at}: first token of mixes", "service", one, "s", ("<=", 1.05), **values))
    return rows


def main() -> int:
    """Command line; exit 0 measured, 1 mixing was not proven."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="of the base; default: %(default)s")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-gpu-", ignore_cleanup_errors=True) as scratch, ExitStack() as stack:
        folder = Path(scratch)
        write_models(folder, SHAPES[args.shape], [RANK], vocabulary=49152)
        write_weights(folder / "base")
        flags = ["--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "64"]
        # Three start together: measured, each would take the others' memory for its own.
        flags += ["--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(KV_BYTES)]
        lora = ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(RANK), "--max-cpu-loras", "4"]
        modules = ["--lora-modules", f"one={folder / f'fused{RANK}'}"]
        settings = {"FUSION_BASE": str(folder / "base"), "FUSION_MAX_LORAS": "1", "FUSION_MAX_LORA_RANK": str(RANK)}
        settings["FUSION_ADAPTERS"] = ",".join(f"p{i}={folder / f'p{i}'}" for i in (0, 1))
        settings["FUSION_PROFILES"] = ""
        print("models written; three servers start", flush=True)
        starts = [
            lambda: ours(flags, folder, **settings),
            lambda: stock([*flags, *lora, *modules], folder / "peer", folder / "base"),
            lambda: stock(flags, folder / "bare", folder / "base"),
        ]
        with ThreadPoolExecutor(len(starts)) as pool:
            mine, peer, bare = pool.map(lambda start: stack.enter_context(start()), starts)
        ready = httpx.get(f"{mine.url}/readyz", timeout=60).json()
        print(json.dumps(ready), flush=True)
        rows = measure(mine, peer, bare, args.pairs)
        if not ready.get("mixing", {}).get("proven"):
            print("mixing was not proven: nothing is recorded", file=sys.stderr)
            return 1
        record("gpu-serving.json", " ".join([COMMAND, *sys.argv[1:]]), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
