"""Serving fused ranks and mixes on a GPU: `python -m benchmarks.gpu [--ranks 8,16,32,64] [--requests 1,32]`.

A base of Llama-2-7B's shape with random weights, bfloat16, and random adapters of rank 8 on all its linear layers.
Every engine is a process of its own and all share the GPU, some 18 GiB each; they start together and are then asked in
turn, so that no two work at once. The peers are vLLM without our code: without LoRA at all, and with one adapter. Ours
answer with one fused adapter of rank r (a sum of r/8 adapters), and with a mix of its own for every request over the
stack of the same adapters. A figure for mixing counts only where the engine's start-up proof passed; where one fails,
the program says so and exits 1.
"""

import argparse
import itertools
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from benchmarks.common import PAIRS, Comparison, record
from benchmarks.gpu_engine import PARENT_RANK, VOCABULARY, run_engine

COMMAND = "python -m benchmarks.gpu"
SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8},
}
Key = tuple[str, int]
"""An engine's kind, or an arm, with its rank."""
Arm = tuple[str, int, str]
"""An engine's kind and rank, and what it answers with."""


def write_models(folder: Path, shape: dict[str, int], ranks: Sequence[int], vocabulary: int = VOCABULARY) -> None:
    """Write the base's configuration, adapters of rank 8, and a fused adapter and a stack for every rank."""
    import torch
    from transformers import LlamaConfig

    from adapters import LoraModule, Recipe, Term, fuse, make_adapter, save, stack

    config = LlamaConfig(
        **shape, vocab_size=vocabulary, max_position_embeddings=2048, architectures=["LlamaForCausalLM"]
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
    for name, parent in parents.items():
        save(parent, folder / name)
    for rank in ranks:
        used = dict(itertools.islice(parents.items(), rank // PARENT_RANK))
        fused, _ = fuse(Recipe("sum", tuple(Term(name, 1 / len(used)) for name in used)), used)
        save(fused, folder / f"fused{rank}")
        save(stack(used).adapter, folder / f"stack{rank}")


@contextmanager
def start_engines(keys: Sequence[Key], folder: Path, logs: Path) -> Iterator[dict[Key, Connection]]:
    """Processes for all engines, started together; the pipes to them, and their end with the block's."""
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], {}
    for kind, rank in keys:
        here, there = context.Pipe()
        log = logs / f"engine-{kind}-{rank}.log"
        processes.append(context.Process(target=run_engine, args=(there, kind, rank, folder, log)))
        processes[-1].start()
        there.close()
        pipes[kind, rank] = here
    try:
        yield pipes
    finally:
        for process, pipe in zip(processes, list(pipes.values()), strict=True):
            try:
                pipe.send(None)
            except OSError:
                process.kill()
            process.join(20)


def usable_engines(pipes: dict[Key, Connection]) -> dict[Key, Connection]:
    """Wait for all engines' reports; those that started and, where they mix, proved it."""
    usable = {}
    for key, pipe in pipes.items():
        try:
            report = pipe.recv()
        except EOFError:
            report = {"error": f"{key}: the process ended, see its log"}
        print(json.dumps(report), flush=True)
        if "error" not in report and report.get("proof", {"proven": True})["proven"]:
            usable[key] = pipe
    return usable


def measure(
    pipes: dict[Key, Connection], arms: Sequence[Arm], n: int, tokens: int, rounds: int
) -> dict[Key, list[float]]:
    """Tokens per second of each (arm, rank) for `n` requests at once, round by round, the order changing each time."""
    rates: dict[Key, list[float]] = {}
    for i in range(rounds + 1):  # the first is not counted: it compiles kernels
        for kind, rank, arm in arms if i % 2 == 0 else arms[::-1]:
            pipes[kind, rank].send((arm, n, tokens))
            rate = pipes[kind, rank].recv()
            if i:
                rates.setdefault((arm, rank), []).append(rate)
    print(n, {f"{arm} {rank}": round(median(taken), 1) for (arm, rank), taken in rates.items()}, flush=True)
    return rates


def compare(rates: dict[Key, list[float]], n: int, ranks: Sequence[int]) -> list[Comparison]:
    """The rows for `n` requests at once."""
    rows = []
    at = f"{n} request{'s' if n > 1 else ''}"

    def row(name: str, ours_is: str, ours: Key, peer_is: str, peer: Key, aim: float) -> None:
        pairs = tuple(rates[ours]), tuple(rates[peer])
        rows.append(Comparison(f"GPU, {at}: {name}", ours_is, peer_is, "tok/s", (">=", aim), *pairs))

    one, base = ("one", PARENT_RANK), ("base", 0)
    for r in ranks:
        fused = ("fused", r)
        if fused not in rates or base not in rates:
            continue
        row(f"fused rank {r} against the base", "one fused adapter", fused, "vLLM without LoRA", base, 0.85)
        if one in rates:
            row(f"fused rank {r} against one rank 8 adapter", "one fused adapter", fused, "vLLM, one adapter", one, 0.9)
        mixed = f"{n} different mixes over a stack of rank {r}" if n > 1 else f"a mix over a stack of rank {r}"
        row(f"{mixed} against one fused adapter", "mixed", ("mixed", r), "built, the same engine", fused, 0.95)
        if ("one", r) in rates and r != PARENT_RANK:
            row(f"{mixed} against vLLM with one adapter", "mixed", ("mixed", r), "vLLM, one adapter", ("one", r), 0.97)
        if ("mixed-dual", r) in rates:
            pair = "mixed, two streams", ("mixed-dual", r), "mixed, one stream", ("mixed", r)
            row(f"{mixed} on two CUDA streams against one", *pair, 1.0)
    return rows


def parse_arguments() -> argparse.Namespace:
    """The command line's arguments."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ranks", type=numbers, default="8,16,32,64", help="of fused adapters; default: %(default)s")
    parser.add_argument("--stock", type=numbers, default="8,16", help="of stock vLLM's engines; default: %(default)s")
    parser.add_argument("--requests", type=numbers, default="1,32", help="at once; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=96, help="of every answer; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=PAIRS, help="default: %(default)s")
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="of the base; default: %(default)s")
    parser.add_argument("--dual", action="store_true", help="also an engine with LoRA on a stream of its own")
    parser.add_argument("--logs", type=Path, default=Path(), help="folder for the engines' logs; default: here")
    return parser.parse_args()


def main() -> int:
    """Command line; exit 0 measured, 1 an engine failed or a proof did not pass."""
    args = parse_arguments()
    ours = [("ours", rank) for rank in args.ranks]
    dual = [("ours-dual", rank) for rank in args.ranks if args.dual]
    keys = [("base", 0), *(("stock", rank) for rank in args.stock), *ours, *dual, ("ours-v1", args.ranks[0])]
    arms: list[Arm] = [("base", 0, "base"), *(("stock", rank, "one") for rank in args.stock)]
    arms += [(*key, arm) for key in ours for arm in ("fused", "mixed")]
    arms += [(*key, "mixed-dual") for key in dual]
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-gpu-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        write_models(folder, SHAPES[args.shape], args.ranks)
        print(f"adapters written; {len(keys)} engines start", flush=True)
        with start_engines(keys, folder, args.logs) as pipes:
            usable = usable_engines(pipes)
            runs = [arm for arm in arms if arm[:2] in usable]
            for n in args.requests:
                rows += compare(measure(usable, runs, n, args.tokens, args.rounds), n, args.ranks)
    if rows:
        record("gpu.json", " ".join([COMMAND, *sys.argv[1:]]), rows)
    return 0 if len(usable) == len(keys) else 1


if __name__ == "__main__":
    sys.exit(main())
