"""An eleven-point sweep against the reference's way: `python -m benchmarks.sweeping [--prompts N]`.

The reference, for each λ: load the base, merge the adapters with PEFT (`cat`), generate one prompt at a time. Ours:
`eval_clients.sweeps.study` on a running service, with scoring, logs and report; the service's start is measured apart.
Same prompts, chat template, greedy, same longest answer, float32, both cores, in one process tree at a time.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import BASE, Comparison, Measurement, record
from benchmarks.servers import ours
from benchmarks.serving import ENGINE, SHIPPED
from eval_clients.endpoint import Endpoint
from eval_clients.running import RunOptions, prepare_folder
from eval_clients.sweeps.points import Point, expand
from eval_clients.sweeps.study import Study, run_study
from eval_clients.tasks import benchmarks as tasks
from training.builtin.safety import read_rows

POINTS: list[Point] = expand(["{1-l}*task + {l}*safety"], ["l=0:1:0.1"])
TOKENS = 32
ROUNDS = 3
COMMAND = "python -m benchmarks.sweeping"


def reference(prompts: list[str]) -> float:
    """Seconds of the reference's way over all points."""
    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    for point in POINTS:
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), SHIPPED["task"], adapter_name="task"
        )
        model.load_adapter(SHIPPED["safety"], adapter_name="safety")
        share = point.values["l"]
        model.add_weighted_adapter(["task", "safety"], [1 - share, share], "mixed", combination_type="cat")
        model.set_adapter("mixed")
        model.eval()
        for prompt in prompts:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
            with torch.inference_mode():
                model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return time.perf_counter() - began


def sweep(url: str, prompts: Sequence[str], folder: Path) -> float:
    """Seconds of a sweep over all points, with its report."""
    prepare_folder(folder, resume=False)
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    study = Study(
        points=POINTS,
        build_tasks=lambda: [tasks.harmless(str(data), max_tokens=TOKENS)],
        folder=folder,
        options=RunOptions(display="none"),
        control_points=(),
        command=COMMAND,
    )
    began = time.perf_counter()
    run_study(Endpoint(f"{url}/v1"), study)
    return time.perf_counter() - began


def main() -> int:
    """Command line; exit 0 measured."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--prompts", type=int, default=8, help="of every weight; default: %(default)s")
    args = parser.parse_args()
    rows = [row.prompt for row in read_rows("heldout") if row.kind == "harmless"][: args.prompts]
    settings = {
        "FUSION_ADAPTERS": ",".join(f"{name}={path}" for name, path in SHIPPED.items()),
        "FUSION_ADAPTER_ROOTS": str(SHIPPED["task"].parent),
    }
    mine, peer, starts = [], [], []
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        for number in range(1, ROUNDS + 1):
            prompts = [f"{prompt} (note {number})" for prompt in rows]  # asked once, so that no cache helps
            # One side at a time: the idle server would not disturb, yet its memory counts.
            with ours(ENGINE, scratch, **settings) as server:
                starts.append(server.started_s)
                mine.append(sweep(server.url, prompts, scratch / f"sweep-{number}"))
            peer.append(reference(prompts))
            print(f"    round {number}/{ROUNDS}: {mine[-1]:.1f} s against {peer[-1]:.1f} s", flush=True)
    comparison = Comparison(
        f"sweep of 11 weights over {args.prompts} prompts",
        "sweep on a running service, with its report",
        "load, merge with PEFT, generate one by one",
        "s",
        ("<=", 0.25),
        tuple(mine),
        tuple(peer),
    )
    start = Measurement("start of the service before the sweep", "s", 60, tuple(starts))
    record("sweeping.json", COMMAND, [comparison, start])
    return 0


if __name__ == "__main__":
    sys.exit(main())
