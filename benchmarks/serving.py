"""The service against stock vLLM: `python -m benchmarks.serving [--rows mixed,materialized,…]`.

Both servers run at once on the same base with the same flags, stock vLLM in a process without our code;
they are asked in turn, so both see the same machine. No prompt is used twice.
"""

import argparse
import itertools
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import httpx
import torch

from adapters import LoraModule, fuse, load, make_adapter, parse, save
from benchmarks.common import BASE_NAME, PAIRS, ROOT, Comparison, alternate, record
from benchmarks.servers import RunningServer, ours, stock
from benchmarks.traffic import base_first_token, first_token, throughput

SHIPPED = {name: ROOT / "examples/adapters" / name for name in ("task", "safety")}
# float32: half of today's x86 servers only emulate bfloat16, and both sides would measure that.
ENGINE = ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "64"]
LOADS = ((16, 32), (64, 16))
"""(requests at once, tokens of each answer); stock vLLM takes minutes for the second."""
ROWS = ("mixed", "materialized", "unseen", "cold", "base", "start")
COMMAND = "python -m benchmarks.serving"
_draw = random.Random(0)


def compare(
    row: Callable[..., Comparison], our_side: Callable[[], float], peer_side: Callable[[], float], pairs: int
) -> None:
    """Measure both sides in turn and record the row, which lacks nothing but the values."""
    record("serving.json", COMMAND, [row(**alternate(our_side, peer_side, pairs))])


def mixes(n: int) -> list[str]:
    """`n` sums of the two adapters with weights never used before."""
    return [f"{_draw.uniform(0.3, 1):.6f}*task + {_draw.uniform(0.1, 0.9):.6f}*safety" for _ in range(n)]


def mixed_throughput(server: RunningServer, n: int, tokens: int) -> float:
    """Output tokens per second of `n` mixes never used before."""
    return throughput(server, mixes(n), tokens)


def save_variants(folder: Path, n: int) -> None:
    """`n` pairs of adapters like the shipped ones but with other digests, and each pair's sum ready-made."""
    for i in range(n):
        pair = {}
        for name, path in SHIPPED.items():
            changed = {
                key: LoraModule(m.a * (1 + 1e-3 * (i + 1)), m.b, m.scaling) for key, m in load(path).modules.items()
            }
            pair[f"{name}{i}"] = make_adapter(changed, BASE_NAME)
            save(pair[f"{name}{i}"], folder / f"{name}{i}")
        fused, _ = fuse(parse(f"0.6*task{i} + 0.4*safety{i}"), pair)
        save(fused, folder / f"ready{i}")


def materialize(folder: Path, n: int) -> list[str]:
    """`n` ready-made sums of the shipped adapters; vLLM's `--lora-modules` values for them."""
    parents = {name: load(path) for name, path in SHIPPED.items()}
    flags = []
    for i in range(n):
        fused, _ = fuse(parse(mixes(1)[0]), parents)
        save(fused, folder / f"made{i}")
        flags.append(f"made{i}={folder / f'made{i}'}")
    return flags


def joint_rank() -> int:
    """Rank of the two shipped adapters together."""
    return sum(load(path).rank for path in SHIPPED.values())


def slots(n: int, cpu: int) -> tuple[list[str], dict[str, str]]:
    """The same numbers of slots for stock vLLM (flags) and for the service (settings)."""
    sizes = {"max-lora-rank": str(joint_rank()), "max-loras": str(n), "max-cpu-loras": str(cpu)}
    flags = ["--enable-lora", *(part for name, size in sizes.items() for part in (f"--{name}", size))]
    return flags, {f"FUSION_{name.replace('-', '_').upper()}": size for name, size in sizes.items()}


def one_slot(scratch: Path, wanted: set[str], pairs: int) -> None:
    """Rows `mixed` and `materialized`: many weights at once in one engine slot."""
    flags, settings = slots(1, 80)
    modules = ["--lora-modules", *materialize(scratch / "made", 64)]
    with stock([*ENGINE, *flags, *modules], scratch) as peer, ours(ENGINE, scratch, **settings) as mine:
        for n, tokens in LOADS if "mixed" in wanted else ():
            print(f"  {n} mixes, one slot", flush=True)
            row = partial(
                Comparison,
                f"{n} requests with {n} different mixes in one slot",
                "service, mixed",
                f"stock vLLM, one adapter of rank {joint_rank()} for all",
                "tok/s",
                (">=", 1.8),
            )
            same = ["made0"] * n
            compare(row, partial(mixed_throughput, mine, n, tokens), partial(throughput, peer, same, tokens), pairs)
        for n, tokens in LOADS if "materialized" in wanted else ():
            print(f"  {n} mixes, one slot, against materialized ones", flush=True)
            row = partial(
                Comparison,
                f"{n} mixes in one slot, against {n} materialized adapters",
                "service, mixed",
                "stock vLLM, one materialized adapter per request",
                "tok/s",
                (">=", 9.0),
            )
            each = [f"made{i}" for i in range(n)]
            compare(row, partial(mixed_throughput, mine, n, tokens), partial(throughput, peer, each, tokens), pairs)


def default_slots(scratch: Path, wanted: set[str], pairs: int) -> None:
    """Rows `unseen`, `cold` and `base`: first tokens and the cost of the service itself."""
    flags, settings = slots(2, 16)
    cold = pairs + 4
    save_variants(scratch / "variants", cold + 1)
    with stock([*ENGINE, *flags], scratch) as peer, ours(ENGINE, scratch, **settings) as mine:
        if "unseen" in wanted:
            print("  new weights", flush=True)
            unseen(mine, pairs)
        if "cold" in wanted:
            print("  adapters not resident", flush=True)
            not_resident(mine, peer, scratch / "variants", cold)
        for n in (1, 16) if "base" in wanted else ():
            print(f"  base model, {n} streams", flush=True)
            base_model(mine, peer, n, pairs)


def unseen(mine: RunningServer, pairs: int) -> None:
    """New weights of resident adapters, against weights requested before."""
    row = partial(
        Comparison,
        "first token with new weights, adapters resident",
        "new weights",
        "a recipe requested before",
        "s",
        ("<=", 1.05),
    )
    warm = ["0.6*task + 0.4*safety"]
    compare(
        row,
        lambda: median(first_token(mine, mixes(1)) for _ in range(15)),
        lambda: median(first_token(mine, warm) for _ in range(15)),
        pairs,
    )


def base_model(mine: RunningServer, peer: RunningServer, n: int, pairs: int) -> None:
    """The base alone, `n` streams at once: throughput and first token."""
    sides, streams = ("service", "stock vLLM"), f"{n} stream{'s' * (n > 1)}"
    row = partial(Comparison, f"base model throughput, {streams}", *sides, "tok/s", (">=", 0.97))
    models = [BASE_NAME] * n
    compare(row, partial(throughput, mine, models, 64), partial(throughput, peer, models, 64), pairs)
    row = partial(Comparison, f"base model first token, {streams}", *sides, "s", ("<=", 1.05))
    compare(row, partial(base_first_token, mine, n), partial(base_first_token, peer, n), pairs)


def not_resident(mine: RunningServer, peer: RunningServer, folder: Path, pairs: int) -> None:
    """Two adapters whose stack was never made, against loading a ready sum and asking for it."""
    for i in range(pairs + 1):
        for name in SHIPPED:
            body = {"name": f"{name}{i}", "path": str(folder / f"{name}{i}")}
            httpx.post(f"{mine.url}/v1/adapters", json=body, timeout=300).raise_for_status()
    our_turn, peer_turn = itertools.count(), itertools.count()

    def build_stack() -> float:
        i = next(our_turn)
        return first_token(mine, [f"0.6*task{i} + 0.4*safety{i}"], source="built")

    def load_folder() -> float:
        i = next(peer_turn)
        began = time.perf_counter()
        body = {"lora_name": f"ready{i}", "lora_path": str(folder / f"ready{i}")}
        httpx.post(f"{peer.url}/v1/load_lora_adapter", json=body, timeout=300).raise_for_status()
        loaded = time.perf_counter() - began
        return loaded + first_token(peer, [f"ready{i}"])

    row = partial(
        Comparison,
        "first token, adapters not resident",
        "service: stack made, loaded, answered",
        "stock vLLM: ready folder loaded, answered",
        "s",
        ("<=", 1.3),
    )
    compare(row, build_stack, load_folder, pairs)


def starting(scratch: Path, pairs: int) -> None:
    """Row `start`: from the command to ready, everything installed; the service with its shipped adapters."""
    flags, settings = slots(2, 16)

    def start_ours() -> float:
        with ours(ENGINE, scratch, **settings) as server:
            return server.started_s

    def start_stock() -> float:
        with stock([*ENGINE, *flags], scratch) as server:
            return server.started_s

    row = partial(Comparison, "start, installed", "service", "stock vLLM", "s", ("<=", 1.2))
    compare(row, start_ours, start_stock, pairs)


def main() -> int:
    """Command line; exit 0 measured."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rows", default=",".join(ROWS), help="which figures; default: %(default)s")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="default: %(default)s")
    args = parser.parse_args()
    wanted = set(args.rows.split(","))
    if wanted - set(ROWS):
        parser.error(f"unknown rows {', '.join(wanted - set(ROWS))}; expected {', '.join(ROWS)}")
    torch.set_num_threads(2)
    scratch = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        if wanted & {"mixed", "materialized"}:
            one_slot(scratch, wanted, args.pairs)
        if wanted & {"unseen", "cold", "base"}:
            default_slots(scratch, wanted, args.pairs)
        if "start" in wanted:
            starting(scratch, args.pairs)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
