"""The service against stock vLLM: `python -m benchmarks.serving [--rows mixed,materialised,…]`.

Both servers run at once on the same base with the same flags, stock vLLM in a process without our code;
they are asked in turn, so both see the same machine. No prompt is used twice.
"""

import argparse
import asyncio
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

import httpx
import torch

from adapters import LoraModule, fuse, load, make_adapter, parse, save
from benchmarks.common import BASE_NAME, PAIRS, ROOT, Comparison, Server, alternate, ours, record, stock

SHIPPED = {name: ROOT / "examples/adapters" / name for name in ("task", "safety")}
# float32: half of today's x86 servers only emulate bfloat16, and both sides would measure that.
ENGINE = ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "64"]
LOADS = ((16, 32), (64, 16))
"""(requests at once, tokens of each answer); stock vLLM takes minutes for the second."""
WORDS = Path(__file__).read_text().split()
_count = itertools.count()
_draw = random.Random(0)


def prompt() -> str:
    """About 65 tokens that no other request has."""
    return f"Note {next(_count)} of {time.time_ns()}: " + " ".join(_draw.choices(WORDS, k=16))


async def _stream(client: httpx.AsyncClient, model: str, tokens: int) -> tuple[float, int, str]:
    """(seconds to the first token, tokens, source header) of one streamed answer."""
    body = {"model": model, "prompt": prompt(), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    began, first, count = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{model}: {answer.status_code} {(await answer.aread()).decode()}")
        source = answer.headers.get("x-fusion-source", "")
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                first = first or time.perf_counter() - began
                count += 1
    return first, count, source


async def _many(url: str, models: Sequence[str], tokens: int) -> tuple[float, float]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=1200, limits=limits) as client:
        began = time.perf_counter()
        answers = await asyncio.gather(*(_stream(client, model, tokens) for model in models))
        spent = time.perf_counter() - began
    return tokens * len(models) / spent, median(first for first, _, _ in answers)


def throughput(server: Server, models: Sequence[str], tokens: int) -> float:
    """Output tokens per second of all `models` asked at once."""
    return asyncio.run(_many(server.url, models, tokens))[0]


def first_token(server: Server, models: Sequence[str], tokens: int = 2) -> float:
    """Median seconds to the first token of all `models` asked at once."""
    return asyncio.run(_many(server.url, models, tokens))[1]


def mixes(n: int) -> list[str]:
    """`n` sums of the two adapters with weights never used before."""
    return [f"{_draw.uniform(0.3, 1):.6f}*task + {_draw.uniform(0.1, 0.9):.6f}*safety" for _ in range(n)]


def mixed_throughput(server: Server, n: int, tokens: int) -> float:
    """Output tokens per second of `n` mixes never used before."""
    return throughput(server, mixes(n), tokens)


def base_first_token(server: Server, n: int) -> float:
    """Median seconds to the base's first token, `n` at once, over several rounds: one alone scatters."""
    return median(first_token(server, [BASE_NAME] * n) for _ in range(15 if n == 1 else 5))


def variants(folder: Path, n: int) -> None:
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


def materialise(folder: Path, n: int) -> list[str]:
    """`n` ready-made sums of the shipped adapters; vLLM's `--lora-modules` values for them."""
    parents = {name: load(path) for name, path in SHIPPED.items()}
    flags = []
    for i in range(n):
        fused, _ = fuse(parse(mixes(1)[0]), parents)
        save(fused, folder / f"made{i}")
        flags.append(f"made{i}={folder / f'made{i}'}")
    return flags


def rank() -> int:
    """Rank of the two shipped adapters together."""
    return sum(load(path).rank for path in SHIPPED.values())


def slots(n: int, cpu: int) -> tuple[list[str], dict[str, str]]:
    """The same numbers of slots for stock vLLM (flags) and for the service (settings)."""
    flags = [
        "--enable-lora",
        "--max-lora-rank",
        str(rank()),
        "--max-loras",
        str(n),
        "--max-cpu-loras",
        str(cpu),
    ]
    names = {"FUSION_MAX_LORA_RANK": rank(), "FUSION_MAX_LORAS": n, "FUSION_MAX_CPU_LORAS": cpu}
    return flags, {key: str(value) for key, value in names.items()}


def one_slot(scratch: Path, wanted: set[str], pairs: int) -> list[Comparison]:
    """Rows `mixed` and `materialised`: many weights at once in one engine slot."""
    rows = []
    flags, settings = slots(1, 80)
    modules = ["--lora-modules", *materialise(scratch / "made", 64)]
    with stock([*ENGINE, *flags, *modules], scratch) as peer, ours(ENGINE, scratch, **settings) as mine:
        for n, tokens in LOADS:
            if "mixed" in wanted:
                print(f"  {n} mixes, one slot", flush=True)
                rows.append(
                    Comparison(
                        f"{n} requests with {n} different mixes in one slot",
                        "service, mixed",
                        f"stock vLLM, one adapter of rank {rank()} for all",
                        "tok/s",
                        (">=", 1.8),
                        **alternate(
                            partial(mixed_throughput, mine, n, tokens),
                            partial(throughput, peer, ["made0"] * n, tokens),
                            pairs,
                        ),
                    )
                )
                record("serving.json", COMMAND, rows[-1:])
        for n, tokens in LOADS:
            if "materialised" in wanted:
                print(f"  {n} mixes, one slot, against materialised ones", flush=True)
                rows.append(
                    Comparison(
                        f"{n} mixes in one slot, against {n} materialised adapters",
                        "service, mixed",
                        "stock vLLM, one materialised adapter a request",
                        "tok/s",
                        (">=", 9.0),
                        **alternate(
                            partial(mixed_throughput, mine, n, tokens),
                            partial(throughput, peer, [f"made{i}" for i in range(n)], tokens),
                            pairs,
                        ),
                    )
                )
                record("serving.json", COMMAND, rows[-1:])
    return rows


def default_slots(scratch: Path, wanted: set[str], pairs: int) -> list[Comparison]:
    """Rows `unseen`, `cold` and `base`: first tokens and the cost of the service itself."""
    rows: list[Comparison] = []

    def done(row: Comparison) -> None:
        rows.append(row)
        record("serving.json", COMMAND, [row])

    flags, settings = slots(2, 16)
    cold = pairs + 4
    variants(scratch / "variants", cold + 1)
    with stock([*ENGINE, *flags], scratch) as peer, ours(ENGINE, scratch, **settings) as mine:
        if "unseen" in wanted:
            print("  weights never seen", flush=True)
            warm = ["0.6*task + 0.4*safety"]
            done(
                Comparison(
                    "first token of weights never seen, adapters resident",
                    "new weights",
                    "a recipe asked for before",
                    "s",
                    ("<=", 1.05),
                    **alternate(
                        lambda: median(first_token(mine, mixes(1)) for _ in range(15)),
                        lambda: median(first_token(mine, warm) for _ in range(15)),
                        pairs,
                    ),
                )
            )
        if "cold" in wanted:
            print("  adapters not resident", flush=True)
            done(_cold(mine, peer, scratch / "variants", cold))
        if "base" in wanted:
            for n in (1, 16):
                print(f"  base model, {n} streams", flush=True)
                done(
                    Comparison(
                        f"base model throughput, {n} stream{'s' * (n > 1)}",
                        "service",
                        "stock vLLM",
                        "tok/s",
                        (">=", 0.97),
                        **alternate(
                            partial(throughput, mine, [BASE_NAME] * n, 64),
                            partial(throughput, peer, [BASE_NAME] * n, 64),
                            pairs,
                        ),
                    )
                )
                done(
                    Comparison(
                        f"base model first token, {n} stream{'s' * (n > 1)}",
                        "service",
                        "stock vLLM",
                        "s",
                        ("<=", 1.05),
                        **alternate(
                            partial(base_first_token, mine, n),
                            partial(base_first_token, peer, n),
                            pairs,
                        ),
                    )
                )
    return rows


def _cold(mine: Server, peer: Server, folder: Path, pairs: int) -> Comparison:
    """Two adapters whose stack was never made, against loading a ready sum and asking for it."""
    for i in range(pairs + 1):
        for name in SHIPPED:
            body = {"name": f"{name}{i}", "path": str(folder / f"{name}{i}")}
            httpx.post(f"{mine.url}/v1/adapters", json=body, timeout=300).raise_for_status()
    turn = {"ours": itertools.count(), "peer": itertools.count()}

    def fresh_stack() -> float:
        i = next(turn["ours"])

        async def ask() -> tuple[float, int, str]:
            async with httpx.AsyncClient(base_url=mine.url, timeout=300) as client:
                return await _stream(client, f"0.6*task{i} + 0.4*safety{i}", 2)

        first, _, source = asyncio.run(ask())
        if source != "built":
            raise RuntimeError(f"the stack of pair {i} was {source}, not built")
        return first

    def ready_folder() -> float:
        i = next(turn["peer"])
        began = time.perf_counter()
        body = {"lora_name": f"ready{i}", "lora_path": str(folder / f"ready{i}")}
        httpx.post(f"{peer.url}/v1/load_lora_adapter", json=body, timeout=300).raise_for_status()
        loaded = time.perf_counter() - began
        return loaded + first_token(peer, [f"ready{i}"])

    return Comparison(
        "first token, adapters not resident",
        "service: stack made, loaded, answered",
        "stock vLLM: ready folder loaded, answered",
        "s",
        ("<=", 1.3),
        **alternate(fresh_stack, ready_folder, pairs),
    )


def starting(scratch: Path, pairs: int) -> list[Comparison]:
    """Row `start`: from the command to ready, everything installed; the service with its shipped adapters."""
    flags, settings = slots(2, 16)

    def begin(server: Server) -> float:
        with server:
            return server.started_s

    measured = alternate(
        lambda: begin(ours(ENGINE, scratch, **settings)),
        lambda: begin(stock([*ENGINE, *flags], scratch)),
        pairs,
    )
    row = Comparison("start, installed", "service", "stock vLLM", "s", ("<=", 1.2), **measured)
    record("serving.json", COMMAND, [row])
    return [row]


ROWS = ("mixed", "materialised", "unseen", "cold", "base", "start")
COMMAND = "python -m benchmarks.serving"


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
        if wanted & {"mixed", "materialised"}:
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
