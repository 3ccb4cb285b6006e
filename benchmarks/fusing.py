"""Fusing the two shipped adapters, files to landed folder, against PEFT's `cat`: `python -m benchmarks.fusing`.

Both sides read the adapters from disk and end with a saved folder. PEFT needs the base model in memory; the time to
load it is left out of its side and reported separately. Ours also syncs the files to disk.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapters import fuse, load, parse, save
from benchmarks.common import BASE, PAIRS, ROOT, Comparison, alternate, record

RECIPE = "0.6*task + 0.4*safety"
PATHS = {name: ROOT / "examples/adapters" / name for name in ("task", "safety")}
COMMAND = "python -m benchmarks.fusing"


def time_ours(folder: Path) -> float:
    """Seconds from two folders to the fused one."""
    began = time.perf_counter()
    fused, _ = fuse(parse(RECIPE), {name: load(path) for name, path in PATHS.items()})
    save(fused, folder)
    spent = time.perf_counter() - began
    shutil.rmtree(folder)
    return spent


def time_peft(model: torch.nn.Module, folder: Path) -> float:
    """Seconds for the same with PEFT, on a base model that is in memory already."""
    began = time.perf_counter()
    wrapped = PeftModel.from_pretrained(model, PATHS["task"], adapter_name="task")
    wrapped.load_adapter(PATHS["safety"], adapter_name="safety")
    wrapped.add_weighted_adapter(["task", "safety"], [0.6, 0.4], "mix", combination_type="cat")
    wrapped.save_pretrained(folder, selected_adapters=["mix"], save_embedding_layers=False)
    spent = time.perf_counter() - began
    wrapped.unload()
    shutil.rmtree(folder)
    return spent


def main() -> int:
    """Measure and record the comparison; exit 0."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pairs", type=int, default=15, help=f"default: %(default)s, at least {PAIRS}")
    args = parser.parse_args()
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    loading = time.perf_counter() - began
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        measured = alternate(lambda: time_ours(folder / "ours"), lambda: time_peft(model, folder / "peft"), args.pairs)
    note = f"PEFT's base model took {loading:.1f} s more to load; ours needs none"
    row = Comparison(
        "fusing the shipped adapters, files to folder",
        "adapters.fuse",
        "PEFT cat, base model in memory",
        "s",
        ("<=", 0.25),
        **measured,
        note=note,
    )
    record("fusing.json", COMMAND, [row])
    print(note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
