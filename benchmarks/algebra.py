"""The algebra at the shapes of real models, PEFT beside it: `python -m benchmarks.algebra [--rows sum,svd,…]`.

Adapters are drawn at random, float32 as PEFT trains them, in the shapes of Llama-2-7B and Llama-3-70B. PEFT's own
methods run on `torch.nn.Linear` layers of those shapes, its adapters in memory; where one layer takes it many seconds
a sample of the layers is timed and said so. Peak memory is that of a process of its own, above what its imports take.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import peft
import torch
from torch import nn

from adapters import LoraAdapter, LoraModule, Recipe, fuse, load, make_adapter, parse, save
from benchmarks.common import PAIRS, RESULTS, Comparison, Measurement, alternate, machine, record

COMMAND = "python -m benchmarks.algebra"
LLAMA_2_7B = {
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
LLAMA_3_70B = {
    "self_attn.q_proj": (8192, 8192),
    "self_attn.k_proj": (1024, 8192),
    "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192),
    "mlp.gate_proj": (28672, 8192),
    "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
}
QV = {name: LLAMA_2_7B[name] for name in ("self_attn.q_proj", "self_attn.v_proj")}
LAYERS_7B, LAYERS_70B = 32, 80
SUM = "0.6*a + 0.4*b"
TIES_SAMPLE = 2  # layers of q and v: modules that our side of `ties` fuses


def draw(seed: int, shapes: dict[str, tuple[int, int]], layers: int, rank: int) -> LoraAdapter:
    """A random adapter, float32, alpha = 2·rank."""
    chance = torch.Generator().manual_seed(seed)
    modules = {}
    for layer in range(layers):
        for name, (d_out, d_in) in shapes.items():
            a = torch.randn(rank, d_in, generator=chance).mul_(0.02)
            b = torch.randn(d_out, rank, generator=chance).mul_(0.02)
            modules[f"model.layers.{layer}.{name}"] = LoraModule(a, b, 2.0)
    return make_adapter(modules, None)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Layer(nn.Module):
    """One linear layer of a base that is not there."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.q_proj = nn.Linear(shape[1], shape[0], bias=False)

    def prepare_inputs_for_generation(self) -> None:
        """PEFT asks for it in a causal language model."""


def peft_seconds(method: str, parents: Sequence[LoraAdapter], rank: int, **options: object) -> Callable[[], float]:
    """Seconds that PEFT takes to fuse one q_proj of `parents` in memory."""
    modules = [adapter.modules["model.layers.0.self_attn.q_proj"] for adapter in parents]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = modules[0].rank
        config = peft.LoraConfig(r=own, lora_alpha=2 * own, target_modules=["q_proj"])
        model = peft.get_peft_model(Layer(modules[0].shape), config, adapter_name="p0")
        for i in range(1, len(modules)):
            model.add_adapter(f"p{i}", config)
    for i, module in enumerate(modules):
        model.base_model.model.q_proj.lora_A[f"p{i}"].weight.data.copy_(module.a)
        model.base_model.model.q_proj.lora_B[f"p{i}"].weight.data.copy_(module.b)
    names, weights = [f"p{i}" for i in range(len(modules))], [0.6, 0.4, *[0.5] * len(modules)][: len(modules)]

    def run() -> float:
        spent = timed(
            lambda: model.add_weighted_adapter(names, weights, "mix", combination_type=method, svd_rank=rank, **options)
        )
        model.delete_adapter("mix")
        return spent

    return run


def copy_seconds(folder: Path) -> float:
    """Seconds to read what the sum reads and to write as many bytes, which is what it writes."""

    def copied() -> None:
        contents = [(folder / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
        with (folder / "plain").open("wb", buffering=0) as out:
            for content in contents:
                out.write(content)

    spent = timed(copied)
    (folder / "plain").unlink()
    return spent


def sum_row() -> list[Comparison | Measurement]:
    """Files to files against reading and writing the same bytes."""
    with scratch() as folder:
        for seed, name in enumerate("ab"):
            save(draw(seed, QV, LAYERS_7B, 8), folder / name)

        def fused(out: Path, *, digests: bool = False) -> None:
            parents = {name: load(folder / name) for name in "ab"}
            made, _ = fuse(parse(SUM), parents)
            provenance = {name: adapter.digest for name, adapter in parents.items()} if digests else None
            save(made, out, provenance=provenance)

        def ours() -> float:
            with mock.patch("os.fsync"):
                spent = timed(lambda: fused(folder / "out"))
            shutil.rmtree(folder / "out")
            return spent

        def whole() -> float:
            spent = timed(lambda: fused(folder / "out", digests=True))
            shutil.rmtree(folder / "out")
            return spent

        # In a process of its own: in ours it would read into memory that the fusion has left behind.
        with ProcessPoolExecutor(1, get_context("spawn")) as peer:
            measured = alternate(ours, lambda: peer.submit(copy_seconds, folder).result(), 21)
        complete = median(whole() for _ in range(PAIRS))
    name = "sum of two Llama-2-7B q/v rank 8, files to files"
    note = f"digests and fsync apart, with both {complete:.3f} s; the plain copy in a process of its own"
    return [
        Comparison(name, "adapters.fuse", "reading and writing the same bytes", "s", ("<=", 2), **measured, note=note)
    ]


def svd_row() -> list[Comparison | Measurement]:
    """Best rank 8 of a sum, in memory, against PEFT's dense SVD."""
    parents = {name: draw(seed, QV, LAYERS_7B, 8) for seed, name in enumerate("ab")}
    count = len(parents["a"].modules)
    theirs = peft_seconds("svd", list(parents.values()), 8)
    seconds: list[float] = []

    def ours() -> float:
        seconds.append(timed(lambda: fuse(parse(f"svd({SUM}, rank=8)"), parents)))
        return count / seconds[-1]

    measured = alternate(ours, lambda: 1 / theirs(), PAIRS)
    name = "svd of that sum to rank 8, in memory"
    for _ in range(14):
        ours()
    return [
        Comparison(
            name,
            "adapters.fuse",
            "PEFT svd",
            "modules/s",
            (">=", 5000),
            **measured,
            note="PEFT: one of 64 modules timed",
        ),
        Measurement(f"{name}, 64 modules", "s", 0.15, tuple(seconds[1:])),
    ]


def ties_row() -> list[Comparison | Measurement]:
    """TIES on the true update against PEFT's ties_svd."""
    parents = {name: draw(seed, QV, TIES_SAMPLE, 8) for seed, name in enumerate("ab")}
    count = len(parents["a"].modules)
    theirs = peft_seconds("ties_svd", list(parents.values()), 16, density=0.5)
    recipe = parse(f"ties({SUM}, density=0.5, rank=16)")
    measured = alternate(lambda: count / timed(lambda: fuse(recipe, parents)), lambda: 1 / theirs(), PAIRS)
    note = f"ours {count} modules of 64, PEFT one; density 0.5, rank 16"
    name = "ties on the update, Llama-2-7B q/v rank 8"
    return [Comparison(name, "adapters.fuse", "PEFT ties_svd", "modules/s", (">=", 20), **measured, note=note)]


def rss() -> int:
    """Bytes of memory this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Bytes of memory this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(case: str, *arguments: str) -> dict[str, float]:
    """Run one case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.algebra", "--child", case, *arguments]
    answer: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return answer


def large_case() -> dict[str, float]:
    """Four adapters of rank 64 on all linear layers, cut to rank 64."""
    before = rss()
    parents = {name: draw(seed, LLAMA_2_7B, LAYERS_7B, 64) for seed, name in enumerate("abcd")}
    recipe = parse("svd(0.4*a + 0.3*b + 0.2*c + 0.1*d, rank=64)")
    spent = timed(lambda: fuse(recipe, parents))
    return {"seconds": spent, "memory": (peak() - before) / sum(adapter.nbytes for adapter in parents.values())}


def large_row() -> list[Comparison | Measurement]:
    """Time and memory of `large_case`."""
    found = [child("large") for _ in range(3)]
    name = "svd of four Llama-2-7B all-linear rank 64 to rank 64, in memory"
    return [
        Measurement(name, "s", 20, tuple(one["seconds"] for one in found)),
        Measurement(f"{name}: peak memory", "of the adapters", 3, tuple(one["memory"] for one in found)),
    ]


def streamed_case(folder: str) -> dict[str, float]:
    """A sum of files read module by module."""
    before = rss()
    parents = {name: load(Path(folder) / name, lazy=True) for name in "ab"}

    def work() -> int:
        made, _ = fuse(parse(SUM), parents)
        save(made, Path(folder) / "out")
        return made.nbytes

    began = time.perf_counter()
    size = work()
    spent = time.perf_counter() - began
    shutil.rmtree(Path(folder) / "out")
    return {"seconds": spent, "above": (peak() - before - size) / 1e9, "output": size / 1e9}


def streamed_row() -> list[Comparison | Measurement]:
    """Memory of `streamed_case`."""
    with scratch() as folder:
        for seed, name in enumerate("ab"):
            save(draw(seed, LLAMA_3_70B, LAYERS_70B, 16), folder / name)
        found = [child("streamed", str(folder)) for _ in range(3)]
    spent = median(one["seconds"] for one in found)
    note = f"output {found[0]['output']:.2f} GB; {spent:.1f} s, synced"
    name = "sum of two Llama-3-70B all-linear rank 16, files to files: memory above the output"
    return [Measurement(name, "GB", 1, tuple(one["above"] for one in found), note)]


def fusions(recipe: Recipe, parents: Mapping[str, LoraAdapter], device: str | None) -> float:
    """Fusions a second."""
    return 1 / timed(lambda: fuse(recipe, parents, device=device))


def cuda_row() -> list[Comparison | Measurement]:
    """The dense methods on a GPU against two cores of a CPU."""
    if not torch.cuda.is_available():
        print("no CUDA device: the row `cuda` is left out", flush=True)
        return []
    parents = {name: draw(seed, QV, 1, 8) for seed, name in enumerate("ab")}
    torch.set_num_threads(2)  # the CPU of the other rows
    rows: list[Comparison | Measurement] = []
    for method in ("ties", "dare_ties", "della", "breadcrumbs"):
        recipe = parse(f"{method}({SUM})")
        measured = alternate(partial(fusions, recipe, parents, "cuda"), partial(fusions, recipe, parents, None))
        name = f"GPU: {method} on the update, two modules of Llama-2-7B, rank 8"
        rows.append(Comparison(name, "CUDA", "2 CPU cores", "fusions/s", (">=", 20), **measured))
    return rows


SCALES: dict[str, Sequence[int]] = {
    "adapters": (1, 2, 4, 8, 16),
    "rank": (4, 8, 16, 32, 64, 128),
    "layers": (8, 16, 32, 64, 80),
}
SCALED: dict[str, Callable[[str, int], str]] = {
    "sum": lambda terms, rank: terms,
    "svd": lambda terms, rank: f"svd({terms}, rank={rank})",
    "knots": lambda terms, rank: f"knots({terms})",
}


def scaling() -> None:
    """Seconds by number of adapters, rank and layers, Llama-2-7B q/v, in memory; a JSON and a plot."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for variable, values in SCALES.items():
        tables[variable] = []
        for value in values:
            at = {"adapters": 2, "rank": 8, "layers": LAYERS_7B} | {variable: value}
            parents = {f"p{i}": draw(i, QV, at["layers"], at["rank"]) for i in range(at["adapters"])}
            terms = " + ".join(f"{1 / len(parents):.6g}*{name}" for name in parents)
            seconds: dict[str, float] = {}
            for method, text in SCALED.items():
                recipe = parse(text(terms, at["rank"]))
                fuse(recipe, parents)
                seconds[method] = median(1 / fusions(recipe, parents, None) for _ in range(3))
            tables[variable].append({"at": value, "seconds": seconds})
            print(f"    {variable} {value}: {seconds}", flush=True)
    content = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": f"{COMMAND} --rows scaling",
        "machine": machine(),
        "case": "Llama-2-7B q/v, in memory; two adapters of rank 8 on 32 layers where nothing else is said; seconds",
        "tables": tables,
    }
    (RESULTS / "algebra-scaling.json").write_text(json.dumps(content, indent=1) + "\n")
    _plot(tables, RESULTS / "algebra-scaling.png")


def _plot(tables: dict[str, list[dict[str, Any]]], file: Path) -> None:
    import matplotlib  # only here: it takes seconds

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(tables), figsize=(12, 3.6), sharey=True, layout="constrained")
    for axis, (variable, rows) in zip(axes, tables.items(), strict=True):
        for method in SCALED:
            axis.plot([row["at"] for row in rows], [row["seconds"][method] for row in rows], "o-", label=method)
        axis.set(xlabel=variable, xscale="log", yscale="log")
        axis.set_xticks([row["at"] for row in rows], [str(row["at"]) for row in rows])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds, Llama-2-7B q/v")
    axes[0].legend()
    figure.savefig(file, dpi=110)


ROWS = {
    "sum": sum_row,
    "svd": svd_row,
    "ties": ties_row,
    "large": large_row,
    "streamed": streamed_row,
    "cuda": cuda_row,
}


def main() -> int:
    """Command line; exit 0 measured."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    everything = ",".join([*ROWS, "scaling"])
    parser.add_argument("--rows", default=everything, help="default: %(default)s")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        case, *rest = args.child
        print(json.dumps(large_case() if case == "large" else streamed_case(*rest)))
        return 0
    wanted = args.rows.split(",")
    if unknown := set(wanted) - set(everything.split(",")):
        parser.error(f"unknown rows {sorted(unknown)}: expected some of {everything}")
    for name in wanted:
        print(f"{name}:", flush=True)
        if name == "scaling":
            scaling()
        elif rows := ROWS[name]():
            record("gpu.json" if name == "cuda" else "algebra.json", f"{COMMAND} --rows {name}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
