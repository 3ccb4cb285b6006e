"""The algebra at the shapes of real models, compared with PEFT: `python -m benchmarks.algebra [--rows sum,svd,…]`.

Adapters are drawn at random, float32 as PEFT trains them, in the shapes of Llama-2-7B and Llama-3-70B. PEFT's own
methods run on `torch.nn.Linear` layers of those shapes, its adapters in memory; where one layer takes many seconds,
a sample of the layers is timed, and the note says so. Peak memory is that of a separate process, above its imports.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from unittest import mock

import torch

from adapters import fuse, load, parse, save
from benchmarks.algebra_cases import (
    LAYERS_7B,
    LAYERS_70B,
    LLAMA_2_7B,
    LLAMA_3_70B,
    QV,
    draw_adapter,
    measure_rate,
    prepare_peft,
    time_call,
)
from benchmarks.algebra_scaling import measure_scaling
from benchmarks.common import PAIRS, Comparison, Measurement, alternate, record

COMMAND = "python -m benchmarks.algebra"
SUM = "0.6*a + 0.4*b"
TIES_SAMPLE = 2  # layers of q and v: modules that our side of `ties` fuses


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        yield Path(name)


def time_copy(folder: Path) -> float:
    """Seconds to read what the sum reads and to write as many bytes as it writes."""

    def copy() -> None:
        contents = [(folder / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
        with (folder / "plain").open("wb", buffering=0) as out:
            for content in contents:
                out.write(content)

    spent = time_call(copy)
    (folder / "plain").unlink()
    return spent


def sum_row() -> list[Comparison | Measurement]:
    """Files to files against reading and writing the same bytes."""
    with temporary_folder() as folder:
        for seed, name in enumerate("ab"):
            save(draw_adapter(seed, QV, LAYERS_7B, 8), folder / name)

        def run(*, digests: bool = False) -> None:
            parents = {name: load(folder / name) for name in "ab"}
            fused, _ = fuse(parse(SUM), parents)
            provenance = {name: adapter.digest for name, adapter in parents.items()} if digests else None
            save(fused, folder / "out", provenance=provenance)

        def ours() -> float:
            with mock.patch("os.fsync"):
                spent = time_call(run)
            shutil.rmtree(folder / "out")
            return spent

        def complete() -> float:
            spent = time_call(lambda: run(digests=True))
            shutil.rmtree(folder / "out")
            return spent

        # In a process of its own: in ours it would read into memory that the fusion has already allocated.
        with ProcessPoolExecutor(1, get_context("spawn")) as peer:
            measured = alternate(ours, lambda: peer.submit(time_copy, folder).result(), 21)
        full = median(complete() for _ in range(PAIRS))
    name = "sum of two Llama-2-7B q/v rank 8, files to files"
    note = f"without digests and fsync, {full:.3f} s with both; the plain copy in a process of its own"
    return [
        Comparison(name, "adapters.fuse", "reading and writing the same bytes", "s", ("<=", 2), **measured, note=note)
    ]


def svd_row() -> list[Comparison | Measurement]:
    """Best rank 8 of a sum, in memory, against PEFT's dense SVD."""
    parents = {name: draw_adapter(seed, QV, LAYERS_7B, 8) for seed, name in enumerate("ab")}
    count = len(parents["a"].modules)
    theirs = prepare_peft("svd", list(parents.values()), 8)
    seconds: list[float] = []

    def ours() -> float:
        seconds.append(time_call(lambda: fuse(parse(f"svd({SUM}, rank=8)"), parents)))
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
    parents = {name: draw_adapter(seed, QV, TIES_SAMPLE, 8) for seed, name in enumerate("ab")}
    count = len(parents["a"].modules)
    theirs = prepare_peft("ties_svd", list(parents.values()), 16, density=0.5)
    recipe = parse(f"ties({SUM}, density=0.5, rank=16)")
    measured = alternate(lambda: count / time_call(lambda: fuse(recipe, parents)), lambda: 1 / theirs(), PAIRS)
    note = f"ours {count} modules of 64, PEFT one; density 0.5, rank 16"
    name = "ties on the update, Llama-2-7B q/v rank 8"
    return [Comparison(name, "adapters.fuse", "PEFT ties_svd", "modules/s", (">=", 20), **measured, note=note)]


def rss() -> int:
    """Bytes of memory this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most bytes of memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_child(case: str, *arguments: str) -> dict[str, float]:
    """Run one case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.algebra", "--child", case, *arguments]
    answer: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return answer


def large_case() -> dict[str, float]:
    """Four adapters of rank 64 on all linear layers, cut to rank 64."""
    before = rss()
    parents = {name: draw_adapter(seed, LLAMA_2_7B, LAYERS_7B, 64) for seed, name in enumerate("abcd")}
    recipe = parse("svd(0.4*a + 0.3*b + 0.2*c + 0.1*d, rank=64)")
    spent = time_call(lambda: fuse(recipe, parents))
    return {"seconds": spent, "memory": (peak() - before) / sum(adapter.nbytes for adapter in parents.values())}


def large_row() -> list[Comparison | Measurement]:
    """Time and memory of `large_case`."""
    runs = [run_child("large") for _ in range(3)]
    name = "svd of four Llama-2-7B all-linear rank 64 to rank 64, in memory"
    return [
        Measurement(name, "s", 20, tuple(run["seconds"] for run in runs)),
        Measurement(f"{name}: peak memory", "of the adapters", 3, tuple(run["memory"] for run in runs)),
    ]


def streamed_case(folder: str) -> dict[str, float]:
    """A sum of files read module by module."""
    before = rss()
    parents = {name: load(Path(folder) / name, lazy=True) for name in "ab"}

    sizes = []

    def run() -> None:
        fused, _ = fuse(parse(SUM), parents)
        save(fused, Path(folder) / "out")
        sizes.append(fused.nbytes)

    spent = time_call(run)
    shutil.rmtree(Path(folder) / "out")
    return {"seconds": spent, "above": (peak() - before - sizes[0]) / 1e9, "output": sizes[0] / 1e9}


def streamed_row() -> list[Comparison | Measurement]:
    """Memory of `streamed_case`."""
    with temporary_folder() as folder:
        for seed, name in enumerate("ab"):
            save(draw_adapter(seed, LLAMA_3_70B, LAYERS_70B, 16), folder / name)
        runs = [run_child("streamed", str(folder)) for _ in range(3)]
    spent = median(run["seconds"] for run in runs)
    note = f"output {runs[0]['output']:.2f} GB; {spent:.1f} s, synced"
    name = "sum of two Llama-3-70B all-linear rank 16, files to files: memory above the output"
    return [Measurement(name, "GB", 1, tuple(run["above"] for run in runs), note)]


def cuda_row() -> list[Comparison | Measurement]:
    """The dense methods on a GPU against two cores of a CPU."""
    if not torch.cuda.is_available():
        print("no CUDA device: the row `cuda` is left out", flush=True)
        return []
    parents = {name: draw_adapter(seed, QV, 1, 8) for seed, name in enumerate("ab")}
    torch.set_num_threads(2)  # the CPU of the other rows
    rows: list[Comparison | Measurement] = []
    for method in ("ties", "dare_ties", "della", "breadcrumbs"):
        recipe = parse(f"{method}({SUM})")
        measured = alternate(
            partial(measure_rate, recipe, parents, "cuda"), partial(measure_rate, recipe, parents, None)
        )
        name = f"GPU: {method} on the update, two modules of Llama-2-7B, rank 8"
        rows.append(Comparison(name, "CUDA", "2 CPU cores", "fusions/s", (">=", 20), **measured))
    return rows


ROWS = {
    "sum": sum_row,
    "svd": svd_row,
    "ties": ties_row,
    "large": large_row,
    "streamed": streamed_row,
    "cuda": cuda_row,
}


def main() -> int:
    """Measure and record the chosen rows; exit 0."""
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
            measure_scaling()
        elif rows := ROWS[name]():
            record("gpu.json" if name == "cuda" else "algebra.json", f"{COMMAND} --rows {name}", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
